"""The CLIP tokenizer: reading one from a folder, and making a small one for a small world.

The format is OpenAI CLIP's byte-level BPE: `vocab.json` (piece -> id), `merges.txt` (one merge a
line, the best first), pieces at the end of a word carry `</w>`. transformers is imported when it is
needed, because importing it takes longer than everything else here.
"""

import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cc_jax.errors import UserError

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"


def load_tokenizer(folder: str | Path) -> Any:
  """transformers' CLIPTokenizer of `folder`, from its files alone.

  Raises:
    UserError: a file is missing or is not what CLIPTokenizer reads.
  """
  folder = Path(folder)
  if not (folder / "tokenizer.json").is_file():
    for name in ("vocab.json", "merges.txt"):
      if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing; a CLIP tokenizer needs it")
  from transformers import CLIPTokenizer

  try:
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # the library's own kinds differ between versions
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"{folder}: no readable CLIP tokenizer ({reason}); copy it again") from error
  if tokenizer.model_max_length > 10_000:
    # What transformers says when tokenizer_config.json is missing or has no length.
    raise UserError(f"{folder / 'tokenizer_config.json'}: model_max_length is missing; add it")
  return tokenizer


def train_tokenizer(
  texts: Iterable[str], folder: str | Path, vocab_size: int, max_length: int
) -> Any:
  """Learns a BPE vocabulary from `texts`, writes it to `folder` and returns it loaded.

  Every byte has a piece, alone and at the end of a word, so any text can be written. The special
  tokens come last: BOS is id n - 2, EOS (also the padding and the unknown token) id n - 1, where
  n = len(tokenizer); the text encoder's config must carry these ids and n as its vocab_size.

  Args:
    texts: sentences in which the words are as frequent as they will be.
    folder: made if it does not exist; existing files are replaced.
    vocab_size: an upper bound on n; merging stops earlier when every word is one piece.
    max_length: the tokenizer's model_max_length, BOS and EOS included.

  Raises:
    UserError: `vocab_size` has no room for the bytes and the special tokens.
  """
  from tokenizers.pre_tokenizers import ByteLevel
  from transformers import CLIPTokenizer

  alphabet = sorted(ByteLevel.alphabet())
  pieces = alphabet + [letter + END_OF_WORD for letter in alphabet]
  room = vocab_size - len(pieces) - 2
  if room < 0:
    raise UserError(f"vocab_size {vocab_size} is too small: bytes and special tokens take "
                    f"{len(pieces) + 2}; use at least {len(pieces) + 3}")
  # The splitting is the loading tokenizer's own, so training and use cannot disagree.
  backend = CLIPTokenizer().backend_tokenizer
  words: collections.Counter[tuple[str, ...]] = collections.Counter()
  for text in texts:
    normal = backend.normalizer.normalize_str(text)
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal):
      words[(*word[:-1], word[-1] + END_OF_WORD)] += 1
  merges = _learn_merges(words, room)
  # Two merges may spell the same piece ("ab" + "c", "a" + "bc"); it has one id.
  pieces = list(dict.fromkeys([*pieces, *("".join(pair) for pair in merges), BOS, EOS]))

  vocab = {piece: index for index, piece in enumerate(pieces)}
  special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
  write_tokenizer(folder, vocab, merges, special, max_length)
  return load_tokenizer(folder)


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
  """Writes the classic four files; transformers 5 by itself writes `tokenizer.json` only.

  Raises:
    ValueError: tokens were added after loading; the classic files have no place for them.
  """
  model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
  added = sorted(set(tokenizer.get_vocab()) - set(model["vocab"]))
  if added:
    raise ValueError(f"tokens {added[:3]} are not in the vocabulary; save the tokenizer without")
  merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
  roles = ("bos_token", "eos_token", "pad_token", "unk_token")
  special = {role: str(getattr(tokenizer, role)) for role in roles}
  write_tokenizer(folder, model["vocab"], merges, special, tokenizer.model_max_length)


def write_tokenizer(
  folder: str | Path, vocab: dict[str, int], merges: list[tuple[str, str]], special: dict[str, str],
  max_length: int,
) -> None:
  """The classic four files of a CLIP tokenizer.

  Args:
    merges: the best first.
    special: role of transformers, as "pad_token" -> its piece.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  config = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": max_length,
    "do_lower_case": True,
    "add_prefix_space": False,
    "errors": "replace",
    **special,
  }
  vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
  files = {
    "vocab.json": json.dumps(vocab, ensure_ascii=False),
    "merges.txt": "".join(f"{a} {b}\n" for a, b in [("#version:", "0.2"), *merges]),
    "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
  }
  for name, text in files.items():
    (folder / name).write_text(text, encoding="utf-8")


def _learn_merges(
  words: collections.Counter[tuple[str, ...]], limit: int
) -> list[tuple[str, str]]:
  """Byte-pair encoding (Sennrich et al. 2016): merge the most frequent neighbours, repeatedly.

  Ties go to the alphabetically first pair. tokenizers' BpeTrainer breaks them by ids that follow
  the order of a hash map: it gives another vocabulary on every run, and ours must be repeatable.
  """
  merges: list[tuple[str, str]] = []
  counts = sorted(words.items())
  while len(merges) < limit:
    pairs: collections.Counter[tuple[str, str]] = collections.Counter()
    for word, count in counts:
      for pair in zip(word, word[1:], strict=False):
        pairs[pair] += count
    if not pairs:
      break
    best = min(pairs, key=lambda pair: (-pairs[pair], pair))
    merges.append(best)
    counts = [(_merge(word, best), count) for word, count in counts]
  return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
  merged: list[str] = []
  for piece in word:
    # Left to right; a piece just merged ends in pair[1] but is longer, so it cannot match again.
    if merged and (merged[-1], piece) == pair:
      merged[-1] += piece
    else:
      merged.append(piece)
  return tuple(merged)
