"""Programs that a test starts collect garbage seldom, and not at their end: to import PyTorch makes
millions of objects, and each look at them takes a second. Python runs this file because of its name."""

import atexit
import gc

gc.set_threshold(100_000, 50, 100)
atexit.register(gc.freeze)
