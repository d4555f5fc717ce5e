# The server on a CPU:
#   docker build -t amphista --build-arg PIP_EXTRA_INDEX_URL=INDEX --build-arg TORCH=torch==2.13.0+cpu .
# INDEX: PyTorch's own index of CPU builds (pytorch.org, "Get Started"); without both arguments pip brings CUDA, too.
#   docker run -p 8000:8000 -e AMPHISTA_API_KEY=SECRET -v amphista:/home/amphista/.cache amphista
# What follows the image's name goes to `amphista serve`. The volume keeps the default target and what was measured.
FROM python:3.11-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home amphista \
 && install --directory --owner=amphista /home/amphista/.cache
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
ARG PIP_EXTRA_INDEX_URL
ARG TORCH=torch==2.13.0
RUN pip install --no-cache-dir -c constraints.txt "$TORCH" \
 && pip install --no-cache-dir -c constraints.txt '.[serve]'
USER amphista
WORKDIR /home/amphista
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["amphista", "serve", "--host", "0.0.0.0"]
