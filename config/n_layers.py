# The paper's main run, OSCAR with the first 8 layers of Mistral-7B as compressor (Table 7), on one 80 GB GPU.
# The data is what config/prepare_msmarco.py makes; the paper's has PISCO's queries too.
out_dir = "out/n_layers"
train_data = "data/msmarco/train.jsonl"
val_data = "data/msmarco/val.jsonl"
generator = "mistralai/Mistral-7B-Instruct-v0.2"
compressor_type = "n_layers"
num_layers = 8  # 5, 8 and 10 in the paper
num_memory_tokens = 8  # 16x; 1 for 128x
num_documents = 5
query_tokens = 64
doc_tokens = 128
answer_tokens = 128
lora_r = 16
lora_alpha = 32
lora_dropout = 0.1
batch_size = 8
gradient_accumulation_steps = 16  # 128 examples a step
epochs = 1.0
generator_lr = 1e-4
compressor_lr = 5e-5
warmup_ratio = 0.05
weight_decay = 0.1
grad_clip = 1.0
gradient_checkpointing = True
