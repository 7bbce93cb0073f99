"""dreambooth_ms teaches Stable Diffusion a new subject from a few photographs, natively on MindSpore."""

import os

__version__ = "0.1.0"

# Both libraries read this when they are imported, which every module of this package does later.
# MindSpore warns of each graph that it takes from the compile cache and of each message between its processes
# (measured); what it cannot do it raises. GLOG_v=2 shows its warnings.
os.environ.setdefault("GLOG_v", "3")
# transformers, whose tokenizers are used, would advise to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
