"""Token ids in, token ids out: sampling, drafting, verification, the loop. Knows nothing of files, HTTP, trainers."""
