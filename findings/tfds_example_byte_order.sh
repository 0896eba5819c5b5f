#!/usr/bin/env bash
# tensorflow-datasets 4.9.10: the same example is serialised to other bytes in every process.
#
# One would guess that two workers that prepare the same records with the same code write the same files,
# so that shards can be compared or resumed by their hash.
# What happens: an example's features are a protobuf map, which SerializeToString() writes in an order
# that differs from process to process (there is deterministic=True, which TFDS does not pass).
# Why it matters: hashes of shards say nothing, a restarted preparation cannot prove that it wrote what
# the interrupted one would have, and caches keyed by content never hit. Records are equal only once
# they are parsed.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10 protobuf==6.33.6
cat > "$folder/write.py" <<'PY'
import hashlib
import os

os.environ["NO_GCE_CHECK"] = "true"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
import tensorflow_datasets as tfds

names = ["frames", "masks", "captions", "class_noun", "subject_id", "family_id", "licence", "creator"]
features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})
example = features.encode_example({name: name for name in names})
record = features.serialize_example(example)
again = tf.train.Example.FromString(record).SerializeToString(deterministic=True)
print(*(hashlib.sha256(data).hexdigest()[:16] for data in (record, again)))
PY
for _ in 1 2 3 4 5; do "$folder/venv/bin/python" "$folder/write.py" 2>/dev/null; done > "$folder/out"
as_written=$(cut -d' ' -f1 "$folder/out" | sort -u | wc -l)
deterministic=$(cut -d' ' -f2 "$folder/out" | sort -u | wc -l)
echo "5 processes: $as_written different serialisations by TFDS, $deterministic with deterministic=True"
[ "$as_written" -gt 1 ] && [ "$deterministic" -eq 1 ] || { echo "it has changed"; exit 1; }
# 5 processes: 5 different serialisations by TFDS, 1 with deterministic=True
