"""Set-up of all tests."""

import signal

# A shell starts background jobs with SIGINT ignored. Python then installs no handler and an interrupt would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
