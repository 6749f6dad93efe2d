"""``python -m kernelab`` is the command line, so that ``torchrun -m kernelab run ...`` works."""

import sys

from kernelab.experiment.cli import main

sys.exit(main())
