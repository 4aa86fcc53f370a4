# after config/smollm.py: a question over its one passage (docs/ladder.md)
train_data = "data/ladder/mixed/train.jsonl"
val_data = "data/ladder/gold.dev.jsonl"
generator = "smollm2"
compressor_type = "skip.SkipNLayersCompressor"  # means, as in most of the tables
num_documents = 1
query_tokens = 48
answer_tokens = 32
batch_size = 64
gradient_accumulation_steps = 1
eval_samples = 0
