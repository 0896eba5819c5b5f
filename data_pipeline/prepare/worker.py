"""A worker process of Beam on this machine: Beam's own, without its lines about its own doings."""

import logging

# Where nobody has set up logging, a first warning of Beam prints all that follows.
logging.getLogger().addHandler(logging.NullHandler())

from apache_beam.runners.worker import sdk_worker_main  # noqa: E402

logging.getLogger(sdk_worker_main.__name__).setLevel(logging.ERROR)  # of folders it does not need

if __name__ == "__main__":
  sdk_worker_main.main([])
