"""SGLang on any CPU: a platform and an attention backend, so that everything here can be run without a GPU."""
