//! The least that a gRPC service can do with an event over tonic: decode it and
//! answer. What a relay costs is told beside it.

use std::{
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    task::{Context, Poll},
};

use analytics_relay::proto::v1::{TrackEventRequest, TrackEventResponse};
use tokio::signal::unix::{SignalKind, signal};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{self, http},
    server::{Grpc, NamedService},
    transport::{Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};

#[derive(Debug, Clone)]
struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "analytics.v1.AnalyticsService";
}

impl<B> Service<http::Request<B>> for Echo
where
    B: codegen::Body + Send + 'static,
    B::Error: Into<codegen::StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        Box::pin(async move {
            let answer = service_fn(|request: Request<TrackEventRequest>| {
                let event_id = request.into_inner().event_id;
                let answer = TrackEventResponse { success: true, event_id, durability: 1 };
                ready(Ok::<_, Status>(Response::new(answer)))
            });
            let codec = ProstCodec::<TrackEventResponse, TrackEventRequest>::default();
            Ok(Grpc::new(codec).unary(answer, request).await)
        })
    }
}

/// Listens at a port of its own, which it prints, until SIGTERM.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = async move {
        terminate.recv().await;
    };
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Server::builder().add_service(Echo).serve_with_incoming_shutdown(incoming, stop).await?;
    Ok(())
}
