# The paper's training data: MS MARCO's queries over Wikipedia (KILT) in chunks of 128 tokens, SPLADE-v3's top 50,
# reranked to 5, answers of Mistral-7B from their full text. Where the two files come from, and how long it takes:
# docs/data.md. The paper adds 453k queries of PISCO's, which are not among these.
dataset = "msmarco"
corpus = "data/kilt_knowledgesource.json"
queries = "data/queries.train.tsv"
max_queries = 500000
generator = "mistralai/Mistral-7B-Instruct-v0.2"
splade = "naver/splade-v3"
reranker = "naver/trecdl22-crossencoder-debertav3"
teacher = "mistralai/Mistral-7B-Instruct-v0.2"
doc_tokens = 128
query_tokens = 64
answer_tokens = 128
top_k = 50
num_documents = 5
batch_tokens = 65536  # for a GPU of 80 GB
