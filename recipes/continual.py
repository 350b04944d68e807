"""Train a sequence of tasks under any accelerate launcher.

    accelerate launch recipes/continual.py --config pm_llm/embedded/quickstart.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/continual.py \\
        --config recipes/standard_cl/t5_large.yaml --data-dir CL_Benchmark --order order1

Every key of the configuration is a flag too (`--train.learning_rate 1e-3`); `pm-llm run --help` lists them.
"""

import sys

from pm_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
