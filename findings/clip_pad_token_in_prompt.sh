#!/usr/bin/env bash
# transformers 5.23.0: with pad_token="!", as SDXL's second tokenizer has, each "!" of a prompt is padding.
#
# One would guess that the padding token only says what fills the end of a sequence, so that SDXL's two
# tokenizers, which share one vocabulary, give the same tokens for a prompt and differ after its end.
# What happens: "!" becomes a special token, cut out of the text before anything else. It has the id of the
# padding, not that of "!" at the end of a word, and "!!" is two tokens where the other tokenizer has one.
# Why it matters: after "!!" every token sits at another place in the second encoder than in the first, and
# a tokenizer of one's own has to do the same to give the same picture.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" transformers==5.23.0 tokenizers==0.23.3
PYTHONPATH=$folder python3 - 2> "$folder/log" <<'PY'
from transformers import CLIPTokenizer

# A small vocabulary in CLIP's order: a letter for each byte, the same at the end of a word, one merged
# token, the special tokens.
plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
letters = [chr(code) for code in plain] + [chr(code) for code in range(256, 512 - len(plain))]
names = [*letters, *(letter + "</w>" for letter in letters), "!!</w>", "<|startoftext|>", "<|endoftext|>"]
vocabulary = {name: i for i, name in enumerate(names)}

def tokens(pad_token):
  tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[("!", "!</w>")], pad_token=pad_token)
  ids = tokenizer("ow!! a!", padding="max_length", max_length=10).input_ids
  print(f"pad_token={pad_token} has id {tokenizer.pad_token_id}:", ids)
  return [names[i] for i in ids]

one, two = tokens("<|endoftext|>"), tokens("!")
start, end = names[-2:]
assert one == [start, "o", "w</w>", "!!</w>", "a</w>", "!</w>", *4 * [end]], "it has changed"
assert two == [start, "o", "w</w>", "!", "!", "a</w>", "!", end, "!", "!"], "it has changed"
PY
# pad_token=<|endoftext|> has id 514: [513, 78, 342, 512, 320, 256, 514, 514, 514, 514]
# pad_token=! has id 0: [513, 78, 342, 0, 0, 320, 0, 514, 0, 0]
