# ModernBERT-base and two linear layers as compressor (paper, appendix J; learning rates as for the llama compressor).
out_dir = "out/modernbert"
train_data = "data/msmarco/train.jsonl"
val_data = "data/msmarco/val.jsonl"
generator = "mistralai/Mistral-7B-Instruct-v0.2"
compressor_type = "modernbert"
compressor_model = "answerdotai/ModernBERT-base"
projection_hidden = 8096
num_memory_tokens = 8
batch_size = 8
gradient_accumulation_steps = 16
generator_lr = 1e-4
compressor_lr = 1e-4
warmup_ratio = 0.05
weight_decay = 0.1
gradient_checkpointing = True
