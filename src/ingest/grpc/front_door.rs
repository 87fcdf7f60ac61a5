//! The gRPC front door: `analytics.v1.AnalyticsService`, method by method.

use std::{borrow::Cow, future::ready, sync::Arc, time::Duration};

use analytics_relay_providers::Event;
use bytes::Bytes;
use futures_util::{FutureExt, Stream, StreamExt, future::Either};
use prometheus_client::metrics::counter::Counter;
use tokio::time::sleep;
use tonic::Status;

use super::{
    asking::{event_count, event_count_response, user_count, user_count_response},
    batch::{BadBatch, Items, batch_response, too_large},
    draft::{read_identify, read_item, read_track},
    message::Message,
    refusal::malformed,
};
use crate::{
    admission::{Accepted, Admission, context::CallContext, denied::Denied},
    health::Health,
    ingest::budget::Held,
    proto::v1::{
        Durability, GetEventCountRequest, GetEventCountResponse, GetUserCountRequest, GetUserCountResponse,
        HealthCheckRequest, HealthCheckResponse, IdentifyUserResponse, TrackBatchResponse,
        TrackEventResponse,
    },
    query::{Known, Query, Question, Unanswered},
    queue,
};

/// Most batches of one stream that wait for the disk at a time. Enough to keep
/// it busy; their events are in the queue already.
const STREAM_BATCHES_MAX: usize = 8;

/// Answers the calls of `AnalyticsService`.
#[derive(Debug)]
pub(crate) struct FrontDoor {
    admission: Arc<Admission>,
    health: Arc<Health>,
    query: Arc<Query>,
    /// Events that were read the long way.
    read_slowly: Counter,
}

impl FrontDoor {
    pub(crate) fn new(
        admission: Arc<Admission>,
        health: Arc<Health>,
        query: Arc<Query>,
        read_slowly: Counter,
    ) -> Self {
        Self { admission, health, query, read_slowly }
    }

    pub(super) async fn track_event(
        &self,
        request: Bytes,
        call: CallContext<'static>,
    ) -> Result<TrackEventResponse, Status> {
        let admitted =
            self.admission.admit(read_track(&request, &self.read_slowly).map_err(malformed)?, &call);
        // Who waits for the disk holds its event and no message.
        drop(request);
        let Accepted { event_id, durability } = admitted.await?;
        Ok(TrackEventResponse {
            success: true,
            event_id: Cow::from(event_id).into_owned(),
            durability: Durability::from(durability).into(),
        })
    }

    pub(super) async fn identify_user(
        &self,
        request: Bytes,
        call: CallContext<'static>,
    ) -> Result<IdentifyUserResponse, Status> {
        let admitted =
            self.admission.admit(read_identify(&request, &self.read_slowly).map_err(malformed)?, &call);
        drop(request);
        let Accepted { event_id, durability } = admitted.await?;
        Ok(IdentifyUserResponse {
            success: true,
            event_id: Cow::from(event_id).into_owned(),
            durability: Durability::from(durability).into(),
        })
    }

    pub(super) async fn track_batch(
        &self,
        batch: Bytes,
        call: CallContext<'static>,
    ) -> Result<TrackBatchResponse, Status> {
        let taken = self.items(batch).and_then(|items| self.take(&items, &call))?;
        Ok(taken.await)
    }

    /// Answers batch by batch until the caller ends the stream, the relay stops
    /// or `age_max` is over. What was read by then is answered. While the queue is
    /// full the stream is not read on, and HTTP/2 holds its caller back.
    pub(super) fn track_stream(
        self: Arc<Self>,
        batches: impl Stream<Item = Result<Message, Status>> + Send,
        age_max: Duration,
        call: CallContext<'static>,
    ) -> impl Stream<Item = Result<TrackBatchResponse, Status>> + Send {
        let health = self.health.clone();
        let over = {
            let health = health.clone();
            async move {
                tokio::select! {
                    () = health.draining() => {}
                    () = sleep(age_max) => {}
                }
            }
        };
        let door = self.clone();
        let read = batches.take_until(over).then(move |batch| {
            let door = door.clone();
            async move {
                let Message { bytes, held } = batch?;
                let items = door.items(bytes)?;
                // About: a message and its event's texts are of like size.
                let bytes = items.bytes() + items.len() * Event::HEAD_BYTES;
                tokio::select! {
                    () = door.admission.room_for(items.len(), bytes) => {}
                    () = door.health.draining() => {}
                }
                Ok((items, held))
            }
        });
        // In the order in which they were read they come into the queue, and in
        // that order they are answered. Behind one that cannot be taken none is
        // read: its answer is the end.
        let mut ended = false;
        let mut take = move |items: Result<(Items, Option<Held>), Status>| {
            if ended {
                return ready(None);
            }
            let taken = items.and_then(|(items, _held)| self.take(&items, &call));
            ended = taken.is_err();
            ready(Some(match taken {
                Ok(answer) => Either::Left(answer.map(Ok)),
                Err(status) => Either::Right(ready(Err(status))),
            }))
        };
        let taken = read.scan((), move |(), items| take(items));
        let end = async move { health.is_draining().then(|| Err(Denied::Draining.into())) };
        taken.buffered(STREAM_BATCHES_MAX).chain(end.into_stream().filter_map(ready))
    }

    /// The items of a batch, if it is one.
    fn items(&self, batch: Bytes) -> Result<Items, Status> {
        match Items::of(batch) {
            Ok(items) => Ok(items),
            Err(BadBatch::TooLarge(items)) => Err(self.admission.denied(too_large(items)).into()),
            Err(BadBatch::Malformed(error)) => Err(malformed(error)),
        }
    }

    /// Puts a batch into the queue at once; the future waits for the disk.
    fn take(
        &self,
        items: &Items,
        call: &CallContext<'_>,
    ) -> Result<impl Future<Output = TrackBatchResponse> + use<>, Status> {
        if self.admission.is_closed() {
            return Err(self.admission.denied(Denied::Draining).into());
        }
        let puts =
            self.admission.put_batch(items.iter().map(|item| read_item(item, &self.read_slowly)), call);
        let admission = self.admission.clone();
        Ok(async move { batch_response(admission.answers(puts).await) })
    }

    pub(super) async fn get_event_count(
        &self,
        request: GetEventCountRequest,
    ) -> Result<GetEventCountResponse, Status> {
        let known = self.ask(event_count(request)).await?;
        event_count_response(&known)
    }

    pub(super) async fn get_user_count(
        &self,
        request: GetUserCountRequest,
    ) -> Result<GetUserCountResponse, Status> {
        let known = self.ask(user_count(request)).await?;
        user_count_response(&known)
    }

    async fn ask(&self, question: Result<Question, Unanswered>) -> Result<Arc<Known>, Status> {
        if self.health.is_draining() {
            return Err(Unanswered::Draining.into());
        }
        self.query.check()?;
        let (known, _) = self.query.answer(&question?).await?;
        Ok(known)
    }

    pub(super) fn health_check(&self, _request: HealthCheckRequest) -> HealthCheckResponse {
        HealthCheckResponse { status: self.health.status() }
    }
}

impl From<queue::Durability> for Durability {
    fn from(level: queue::Durability) -> Self {
        match level {
            queue::Durability::Queued => Self::Queued,
            queue::Durability::Written => Self::Written,
            queue::Durability::Synced => Self::Synced,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use std::pin::pin;

    use futures_util::stream;
    use prost::Message as _;
    use tokio::time::timeout;

    use super::*;
    use crate::{
        proto::v1::{
            TrackBatchItem, TrackBatchRequest, TrackEventRequest, track_batch_answer::Answer,
            track_batch_item::Item,
        },
        queue::{
            Queue, QueueLimits,
            memory::{self, QueueReceiver, QueueSender},
        },
        shutdown::Stop,
        telemetry::Telemetry,
        time::Clock,
    };

    const CALL: CallContext<'static> = CallContext::of_grpc(IpAddr::V4(Ipv4Addr::LOCALHOST));

    fn batch(name: &str) -> Result<Message, Status> {
        let track = TrackEventRequest { event_name: name.into(), ..Default::default() };
        let request = TrackBatchRequest { items: vec![TrackBatchItem { item: Some(Item::Track(track)) }] };
        Ok(Message { bytes: request.encode_to_vec().into(), held: None })
    }

    fn door(events_max: usize, stop: Stop) -> (Arc<FrontDoor>, QueueSender, QueueReceiver) {
        let mut telemetry = Telemetry::new(0);
        let (queue, receiver) = memory::bounded(QueueLimits { events_max, bytes_max: 1 << 20 });
        let admission = Admission::new(
            Queue::Memory(queue.clone(), telemetry.accepted()),
            Clock::system(),
            telemetry.admission(),
        );
        let health = Health::new(stop, queue.clone(), Vec::new(), None);
        (
            Arc::new(FrontDoor::new(
                Arc::new(admission),
                Arc::new(health),
                Query::of_nothing(),
                Counter::default(),
            )),
            queue,
            receiver,
        )
    }

    /// The answers to a stream that its caller does not end, and the events that
    /// came into the queue.
    async fn answers(
        requests: Vec<Result<Message, Status>>,
        stop: Stop,
    ) -> (Vec<Result<TrackBatchResponse, Status>>, usize) {
        let (door, queue, _receiver) = door(10, stop);
        let requests = stream::iter(requests).chain(stream::pending());
        (door.track_stream(requests, Duration::from_secs(300), CALL).collect().await, queue.events())
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_holds_a_stream_back_and_not_for_ever() {
        let (door, _, mut receiver) = door(2, Stop::default());
        let requests = stream::iter((0..4).map(|_| batch("a"))).chain(stream::pending());
        let mut answers = pin!(door.track_stream(requests, Duration::from_secs(300), CALL));
        let mut next = async || {
            let answer = timeout(Duration::from_secs(4), answers.next()).await;
            answer.ok().map(|answer| answer.unwrap().unwrap().answers[0].answer.clone().unwrap())
        };
        for _ in 0..2 {
            assert!(matches!(next().await, Some(Answer::Accepted(_))));
        }
        assert_eq!(next().await, None);
        receiver.recv_many(&mut Vec::new(), 1).await;
        assert!(matches!(next().await, Some(Answer::Accepted(_))));
        // Nothing leaves the queue any more.
        assert_eq!(next().await, None);
        assert!(matches!(next().await, Some(Answer::Deferred(deferred)) if deferred.reason == "QUEUE_FULL"));
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_stream_ends_with_ok_when_all_is_answered() {
        let (answers, queued) = answers(vec![batch("a"), batch("")], Stop::default()).await;
        let answer = |index: usize| answers[index].as_ref().unwrap().answers[0].answer.as_ref().unwrap();
        assert!(matches!(answer(0), Answer::Accepted(_)));
        assert!(matches!(answer(1), Answer::Refused(_)));
        assert_eq!((answers.len(), queued), (2, 1));
    }

    #[tokio::test]
    async fn behind_what_cannot_be_read_nothing_is_taken() {
        let torn = Err(Status::invalid_argument("torn"));
        let (answers, queued) = answers(vec![batch("a"), torn, batch("b")], Stop::default()).await;
        assert!(answers[0].is_ok());
        assert_eq!(answers[1].as_ref().unwrap_err().message(), "torn");
        assert_eq!((answers.len(), queued), (2, 1));
    }

    #[tokio::test]
    async fn a_stream_of_a_relay_that_stops_ends_with_that() {
        let stop = Stop::default();
        stop.drain();
        let (answers, queued) = answers(Vec::new(), stop).await;
        assert_eq!(answers[0].as_ref().unwrap_err().code(), tonic::Code::Unavailable);
        assert_eq!((answers.len(), queued), (1, 0));
    }
}
