# config/n_layers.py, learning to rerank as well: an RR token whose score follows the reranker's (paper, section 3.4).
# Needs "reranking_scores" in the training data.
out_dir = "out/rerank"
train_data = "data/msmarco/train.jsonl"
val_data = "data/msmarco/val.jsonl"
generator = "mistralai/Mistral-7B-Instruct-v0.2"
compressor_type = "n_layers"
num_layers = 8
enable_reranking = True
rerank_lambda = 0.05
batch_size = 8
gradient_accumulation_steps = 16
generator_lr = 1e-4
compressor_lr = 5e-5
gradient_checkpointing = True
