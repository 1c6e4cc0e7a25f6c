"""Lance-tiny: the small trained Lance that ships, its world, its training and its weights."""

# In the keys of what is made from drawn scenes: raise it where the same arguments give other requests
# (tests/tiny/test_requests.py holds their digest).
SCENES_REVISION = 3
