"""3D models become captures: pictures of each in many views, with masks, poses and captions.

    python -m data_pipeline.objects --models=FOLDER --out=DATA --views=24 --size=128

writes a TFDS data set that `data.source='tfds'`, `data.name='objects'`, `data.data_dir=DATA`
trains on. Needs `moderngl` and `trimesh`, and EGL: on Debian libegl1 and libgl1-mesa-dri.
"""
