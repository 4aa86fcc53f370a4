# after config/smollm.py: repeat a chunk of text from its memory alone (docs/ladder.md)
generator = "smollm2"
compressor_type = "skip.SkipNLayersCompressor"  # means, as in most of the tables
device = "cpu"
num_documents = 1
query_tokens = 8
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 100
eval_interval = 25
eval_examples = 48
eval_samples = 48
