# SmolLM2-135M, its first 10 layers as compressor, which also choose the tokens to keep (skip.py); what it has given:
# docs/ladder.md, there with one passage a question. In 4.3 GB of a CPU, where it takes 7 to 11 hours in bfloat16 and a
# day in float32 (2 cores); on a GPU with --batch_size=64 --gradient_accumulation_steps=1
out_dir = "out/smollm"
train_data = "data/train.jsonl"
val_data = "data/val.jsonl"
generator = "HuggingFaceTB/SmolLM2-135M-Instruct"
compressor_type = "skip.SelectNLayersCompressor"
num_layers = 10
num_memory_tokens = 8
query_tokens = 64
doc_tokens = 128
answer_tokens = 64
lora_dropout = 0.0
batch_size = 2
gradient_accumulation_steps = 32
max_iters = 390  # 24,960 examples, however many train_data has
generator_lr = 1e-3
compressor_lr = 4e-4
beta2 = 0.98
eval_interval = 130
eval_examples = 256
eval_samples = 50
