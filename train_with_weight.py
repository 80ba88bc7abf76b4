"""The weights of a list, whatever made them: the released code's other name for train_with_Teacher_weight.py.

Run      python train_with_weight.py --train_csv WEIGHTS.csv --valid_csv VALID.csv --test_csv TEST.csv --name weighted
2 GPUs   torchrun --standalone --nproc_per_node=2 train_with_weight.py ... (same flags)
Results  benchmarks/nlkd.md
"""

from train_with_Teacher_weight import main
from utils.args import WeightArgs, launch

if __name__ == "__main__":
    launch(main, WeightArgs)
