"""Compiles the proto file anew: `python3 tests/make_proto.py`, with grpcio-tools."""

import pathlib

from grpc_tools import protoc

HERE = pathlib.Path(__file__).resolve().parent.parent
PROTO = HERE.parent.parent / "proto"


def main():
    out = HERE / "analytics_relay" / "_proto" / "analytics.binpb"
    failed = protoc.main(["protoc", f"-I{PROTO}", f"--descriptor_set_out={out}", "analytics/v1/analytics.proto"])
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
