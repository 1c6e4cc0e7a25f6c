"""What the linears of Lance see: calibration samples, layers streamed over them, hooks at the four input sites."""

# In the keys of what is made from the bundled set: raise it where the same arguments give other requests
# (tests/calibration/test_bundled.py holds their digest).
BUNDLED_REVISION = 1
