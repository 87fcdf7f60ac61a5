"""The messages of `proto/analytics/v1/analytics.proto`.

They are made from `analytics.binpb`, the compiled file, in a pool of their own:
no generated code that one protobuf takes and the next refuses, no top-level
package `analytics`, and no quarrel with stubs that the program has made from
another version of the same file. `python3 tests/make_proto.py` makes it anew.
"""

import pkgutil

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FILE = descriptor_pb2.FileDescriptorSet.FromString(pkgutil.get_data(__name__, "analytics.binpb")).file[0]

_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(FILE.SerializeToString())


def _message(name):
    descriptor = _pool.FindMessageTypeByName(f"{FILE.package}.{name}")
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(_pool).GetPrototype(descriptor)  # protobuf before 4.22


TrackEventRequest = _message("TrackEventRequest")
IdentifyUserRequest = _message("IdentifyUserRequest")
TrackBatchItem = _message("TrackBatchItem")
TrackBatchRequest = _message("TrackBatchRequest")
TrackBatchResponse = _message("TrackBatchResponse")

TRACK_BATCH = f"/{FILE.package}.AnalyticsService/TrackBatch"
DURABILITIES = {
    value.name.rpartition("_")[2].lower(): value.number
    for value in _pool.FindEnumTypeByName(f"{FILE.package}.Durability").values
}
