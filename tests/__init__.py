"""One thread, unless OMP_NUM_THREADS asks for more; processes that tests start inherit it.

Tensors are small here: a second thread brings nothing, and on a busy machine costs many times what
the work does. Numpy and torch read the number when they are imported, so it stands before them.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
