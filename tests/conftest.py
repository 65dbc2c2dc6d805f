"""What the whole suite needs of the process that it runs in."""

import signal

# A shell starts its background jobs with Ctrl-C ignored. The programs that tests start would
# inherit that, and never end by the signal that they are sent.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
