"""Settings of all tests."""

from __future__ import annotations

import logging

# pytest would format thousands of torch's trace records, which doubles the time of an export.
logging.getLogger("torch.__trace").propagate = False
