# ModernBERT-base learns to be read by Mistral-7B, from text alone (paper, appendix I); config/modernbert.py can begin
# with it: --init_from=out/pretrain_modernbert/best. A corpus of chunks of 128 tokens, each twice: repeat, continue.
# Any corpus in two parts, here one that prepare.py has made:
#     mkdir -p data/pretrain && head -n 1000 data/msmarco/corpus.jsonl > data/pretrain/val.jsonl
#     tail -n +1001 data/msmarco/corpus.jsonl > data/pretrain/train.jsonl
out_dir = "out/pretrain_modernbert"
task = "pretrain"
train_data = "data/pretrain/train.jsonl"
val_data = "data/pretrain/val.jsonl"
generator = "mistralai/Mistral-7B-Instruct-v0.2"
compressor_type = "modernbert"
compressor_model = "answerdotai/ModernBERT-base"
projection_hidden = 8096
num_memory_tokens = 8
num_documents = 1
answer_tokens = 129  # a chunk and its end
batch_size = 8
gradient_accumulation_steps = 16
generator_lr = 1e-4
compressor_lr = 1e-4
warmup_ratio = 0.05
weight_decay = 0.1
gradient_checkpointing = True
