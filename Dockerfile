# The server of `fromage serve`. PyTorch is the default build of its platform, or that of the index of wheels in TORCH_INDEX.
FROM python:3.11-slim
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY modeling_fromage modeling_fromage
COPY training training
COPY hub_scripts hub_scripts
RUN pip install --no-cache-dir '.[serve,index]' && rm -rf /src/*
RUN useradd --create-home fromage
USER fromage
WORKDIR /home/fromage
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["fromage", "serve", "--host", "0.0.0.0"]
CMD ["--help"]
