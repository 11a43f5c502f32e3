# vLLM with proxytune, for GPUs: vLLM's own image, and the plugin in its Python.
#
#     docker build --tag proxytune-vllm .
#     docker run --gpus all --ipc host --publish 8000:8000 --volume ./models:/models proxytune-vllm /models/my-recipe
#
# The range of vLLM is that of src/proxytune/vllm/__init__.py.
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}

WORKDIR /opt/proxytune
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
# The versions of constraints-vllm.txt; all else that proxytune needs vLLM's image has.
RUN python3 -m pip install --no-cache-dir transformers==5.19.0 peft==0.21.2 .

WORKDIR /models
# It checks the recipe, prints vLLM's command and becomes it. Options of vLLM follow the recipe.
ENTRYPOINT ["proxytune", "serve", "--engine", "vllm"]
