"""One file a stage: a Prefect task that reads artifacts, calls the library and keeps an artifact in the store."""
