# The small real run (docs/ladder.md): SmolLM2-135M, its first 10 layers with a skip connection as compressor.
# As it stands for a CPU, in 4 GB; on a GPU with --batch_size=64 --gradient_accumulation_steps=1
out_dir = "out/smollm"
train_data = "data/train.jsonl"
val_data = "data/val.jsonl"
generator = "HuggingFaceTB/SmolLM2-135M-Instruct"
compressor_type = "skip.SkipNLayersCompressor"
num_layers = 10
num_memory_tokens = 8
query_tokens = 64
doc_tokens = 128
answer_tokens = 64
lora_dropout = 0.0
batch_size = 2
gradient_accumulation_steps = 32
max_iters = 390  # 24,960 examples
generator_lr = 1e-3
compressor_lr = 4e-4
beta2 = 0.98
eval_interval = 130
eval_examples = 256
eval_samples = 50
