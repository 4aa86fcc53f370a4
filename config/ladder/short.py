# after one_passage.py: 5,120 examples on a CPU, a fifth of the whole run, with F1 on the way
device = "cpu"
batch_size = 16
gradient_accumulation_steps = 2
max_iters = 160
eval_interval = 32
eval_examples = 128
eval_samples = 128
seed = 2
