"""Names of the layouts that `data_pipeline.readers` knows, for those who need no reader."""

# In the order in which a folder is compared with them.
LAYOUTS = ("mvimgnet", "co3d", "wildrgbd", "omniobject3d", "openimages", "subjects200k", "syncd",
           "uno", "webdataset", "pictures")  # fmt: skip
# 'manifest': what `Manifest.write` wrote; 'folder': data_pipeline/sources/folder.py.
CHOICES = ("auto", *LAYOUTS, "manifest", "folder")
