"""Names of devices and number types an encoder can be asked for; apart from `hardware`, which loads PyTorch."""

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
