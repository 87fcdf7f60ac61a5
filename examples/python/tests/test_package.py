"""The package beside others, and as it is installed."""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

from google.protobuf import descriptor_pb2

from support import Case, PACKAGE, PATIENCE, Relay, _proto, environment, has, needs, needs_relay, run

PROTO = PACKAGE.parent.parent / "proto"


def shape(file):
    """The file without what only compilers and readers of comments want."""
    file = descriptor_pb2.FileDescriptorProto.FromString(file.SerializeToString())
    file.ClearField("source_code_info")
    messages = list(file.message_type)
    while messages:
        message = messages.pop()
        messages.extend(message.nested_type)
        for field in message.field:
            field.ClearField("json_name")
    return file


class Package(Case):
    def test_another_package_named_analytics_and_the_program_s_own_stubs_are_no_matter(self):
        with tempfile.TemporaryDirectory() as folder:
            package = pathlib.Path(folder) / "analytics"
            package.mkdir()
            (package / "__init__.py").write_text("write_key = 'segment'\n")
            # Stubs from another version of the same file, in the pool that all programs share.
            other = descriptor_pb2.FileDescriptorProto(
                name=_proto.FILE.name, package=_proto.FILE.package, syntax="proto3"
            )
            other.message_type.add(name="TrackEventRequest").field.add(name="other", number=1, type=9, label=1)
            relay = self.relay()
            for order in (
                "stubs(); from analytics_relay import Analytics",
                "from analytics_relay import Analytics; stubs()",
            ):
                done = run(
                    "import sys, analytics\n"
                    "from google.protobuf import descriptor_pool\n"
                    f"def stubs(): descriptor_pool.Default().AddSerializedFile({other.SerializeToString()!r})\n"
                    f"{order}\n"
                    "assert analytics.write_key == 'segment'\n"
                    "with Analytics(sys.argv[1]) as client: client.track('A', 'u')",
                    relay.address,
                    before=[folder],
                )
                self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(relay.names(), ["A", "A"])

    def test_the_working_directory_is_no_matter(self):
        done = subprocess.run([sys.executable, "-c", "import analytics_relay"], cwd="/", env=environment(), check=False)
        self.assertEqual(done.returncode, 0)

    @needs(has("grpc_tools"), "grpcio-tools")
    def test_the_messages_are_those_of_the_proto_file(self):
        with tempfile.NamedTemporaryFile() as made:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "grpc_tools.protoc",
                    f"-I{PROTO}",
                    f"--descriptor_set_out={made.name}",
                    "analytics/v1/analytics.proto",
                ],
                check=True,
            )
            files = descriptor_pb2.FileDescriptorSet.FromString(pathlib.Path(made.name).read_bytes())
        self.assertEqual(shape(files.file[0]), shape(_proto.FILE), "run python3 tests/make_proto.py")

    @needs_relay
    def test_the_messages_are_those_of_the_relay(self):
        """It tells them by reflection, so that this needs no compiler."""
        import grpc

        with Relay() as relay, grpc.insecure_channel(relay.address) as channel:
            ask = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
            symbol = f"{_proto.FILE.package}.AnalyticsService".encode()
            answer = next(ask(iter([b"\x22" + bytes([len(symbol)]) + symbol]), timeout=PATIENCE))
        files = [descriptor_pb2.FileDescriptorProto.FromString(file) for file in field(field(answer, 4)[0], 1)]
        (file,) = [file for file in files if file.package == _proto.FILE.package]
        file.name = _proto.FILE.name
        self.assertEqual(shape(file), shape(_proto.FILE), "run python3 tests/make_proto.py")

    @needs(has("pip", "setuptools", "wheel"), "one of pip, setuptools and wheel")
    def test_it_installs_without_a_compiler_and_runs_without_the_repository(self):
        with tempfile.TemporaryDirectory() as folder:
            source, target = pathlib.Path(folder) / "source", pathlib.Path(folder) / "target"
            shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--no-deps",
                    "--no-build-isolation",
                    "--no-index",
                    "--disable-pip-version-check",
                    "--root-user-action=ignore",
                    "--target",
                    str(target),
                    str(source),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertTrue((target / "analytics_relay" / "py.typed").exists())
            shutil.rmtree(source)
            paths = environment()
            paths["PYTHONPATH"] = paths["PYTHONPATH"].replace(str(PACKAGE), str(target))
            done = subprocess.run(
                [sys.executable, "-c", "import analytics_relay as a; a.Analytics('localhost:1'); print(a.__file__)"],
                cwd=folder,
                env=paths,
                capture_output=True,
                text=True,
                check=False,
            )
            self.assertTrue(done.stdout.startswith(str(target)), done.stdout + done.stderr)


def field(message, number):
    """The values of a field that is bytes, of a message whose type is not here."""
    at, found = 0, []

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        value = varint()
        if tag & 7 == 2:
            if tag >> 3 == number:
                found.append(message[at : at + value])
            at += value
    return found


if __name__ == "__main__":
    unittest.main()
