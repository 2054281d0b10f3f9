"""The command line. Commands import torch only when they run."""
