"""The command line, with the number of losses each process evaluated; started by ``accelerate launch``."""

import os
import sys
from pathlib import Path

from analysis import Objective
from bilora.cli.app import main

if __name__ == "__main__":
    evaluate, counted = Objective.evaluate, []
    Objective.evaluate = lambda self, space: counted.append(1) or evaluate(self, space)
    code = main(sys.argv[1:])
    Path(f"evaluated-{os.environ['RANK']}").write_text(str(len(counted)))
    sys.exit(code)
