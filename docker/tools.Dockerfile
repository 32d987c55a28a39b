# The tools image: `marina`, for training, the steps of the pipeline and the gateway.
#
#   DOCKER_BUILDKIT=1 docker build -f docker/tools.Dockerfile -t marina/tools .
#   docker run --rm --gpus all --shm-size 2g -v "$PWD:/workspace" --user "$(id -u)" marina/tools train --data data/cells
#
# Any --user will do. What is written goes to /workspace and /tmp. The workers that read pictures hand them over in /dev/shm;
# where that is small they take a slower way, and say so.
#
# Build arguments and the secret: as in Dockerfile. Without TORCH_INDEX it holds the CUDA build of torch.
ARG BASE_IMAGE=debian:bookworm-slim

# Marina as a wheel, and uv for the last stage to borrow.
FROM ${BASE_IMAGE} AS installer
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/*
COPY docker/installer.lock /
RUN --mount=type=secret,id=ca_bundle \
    if [ -f /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi \
    && pip install --no-cache-dir --require-hashes --target /installer -r /installer.lock
COPY pyproject.toml README.md LICENSE /source/
COPY handlers /source/handlers
COPY model_defs /source/model_defs
COPY tools /source/tools
WORKDIR /source
RUN PYTHONPATH=/installer python3 -m hatchling build --target wheel --directory /wheel

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# The lock holds more than is wanted, so it only constrains: to its versions, and to its hashes, which uv verifies. CPU
# builds of torch have other files: there the index is trusted for their content. OpenCV, which the trackers import, comes
# without its windows, as those want a library of X11 and one of OpenGL to load.
ARG TORCH_INDEX=
ENV PATH=/opt/marina/bin:$PATH
RUN --mount=type=secret,id=ca_bundle \
    --mount=type=bind,from=installer,source=/installer,target=/installer \
    --mount=type=bind,from=installer,source=/wheel,target=/wheel \
    --mount=type=bind,source=requirements.lock,target=/requirements.lock \
    --mount=type=bind,source=docker/opencv.lock,target=/opencv.lock \
    if [ -f /run/secrets/ca_bundle ]; then export SSL_CERT_FILE=/run/secrets/ca_bundle; fi \
    && export UV_NO_CACHE=1 VIRTUAL_ENV=/opt/marina PATH=/installer/bin:$PATH \
    && uv venv --python /usr/bin/python3 /opt/marina \
    && cp /requirements.lock /tmp/all.lock \
    && if [ -n "$TORCH_INDEX" ]; then \
         grep -oE '^(torch|torchvision)==[^ ]+' /requirements.lock > /tmp/torch.lock \
         && uv pip install --no-deps --default-index "$TORCH_INDEX" -r /tmp/torch.lock \
         && awk '/^[^ ]/ { cuda = /^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ } !cuda' \
              /requirements.lock > /tmp/all.lock; \
       fi \
    && for wheel in /wheel/*.whl; do \
         uv pip install --verify-hashes --constraint /tmp/all.lock \
           "marina[client,gateway,mlflow,onnx,openvino,s3,train,wandb] @ file://$wheel"; \
       done \
    && uv pip uninstall opencv-python \
    && uv pip install --no-deps --require-hashes -r /opencv.lock \
    && rm -f /tmp/all.lock /tmp/torch.lock \
    && install -d -m 0775 /workspace

ENV HOME=/tmp \
    USER=marina \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
USER 10001:0
STOPSIGNAL SIGTERM
ENTRYPOINT ["marina"]
