//! `make demo-crash`: the relay keeps its events in a log and is killed with
//! SIGKILL while the sender is sending, then started again. The sender asks again
//! with the same id when an answer was lost, as a caller should.

use std::{
    collections::HashSet,
    path::Path,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::analytics_service_client::AnalyticsServiceClient,
    providers::sandbox::{Sandbox, Vendor},
};
use tokio::{sync::watch, time::sleep};
use tonic::transport::Channel;

use crate::{
    RATE, print_balance, received,
    relay::{Relay, is_identify, send_one},
};

/// Seconds of sending.
const SECONDS: u64 = 6;

pub(crate) async fn show(sandbox: &Sandbox, data_dir: &Path) -> anyhow::Result<()> {
    let settings = [("DURABILITY", "synced")];
    let relay = Relay::start(sandbox, data_dir, &settings).await?;
    let addr = relay.addr.clone();
    println!("relay with DURABILITY=synced at {addr}, process {}", relay.child.id().unwrap_or_default());
    sandbox.always(Vendor::Segment, Some("503".parse()?));
    println!("segment is down\n");

    let (done, is_done) = watch::channel(false);
    let sender = tokio::spawn(send(addr.clone(), is_done));
    let start = Instant::now();
    let second = |second: u64| {
        let until = start + Duration::from_secs(second);
        async move {
            sleep(until.saturating_duration_since(Instant::now())).await;
            println!("{second:>3} s  {}", received(sandbox));
        }
    };
    for number in 1..=SECONDS / 2 {
        second(number).await;
    }

    println!("\nSIGKILL, with the sender still sending");
    relay.signal("KILL")?;
    relay.ended().await?;
    let started = Instant::now();
    let port = addr.rsplit(':').next().unwrap_or_default();
    let relay = Relay::start(sandbox, data_dir, &[settings[0], ("GRPC_PORT", port)]).await?;
    println!("started again: it takes events after {} ms", started.elapsed().as_millis());
    println!("segment is back\n");
    sandbox.always(Vendor::Segment, None);
    for number in SECONDS / 2 + 1..=SECONDS {
        second(number).await;
    }
    done.send_replace(true);
    let sent = sender.await??;

    println!("\nSIGTERM");
    relay.signal("TERM")?;
    let (balances, code) = relay.ended().await?;
    let (tracks, identifies) = (sent.tracks.len(), sent.identifies);
    println!("exit code {code:?}; {tracks} tracks and {identifies} identifies were answered OK,");
    println!("{} of them when they were sent again after a lost answer\n", sent.lost_answers);
    let mut exact = print_balance(sandbox, &balances);
    for vendor in Vendor::ALL {
        let taken = sandbox.taken(vendor);
        // Mixpanel's profile updates have no id.
        let ids: HashSet<&str> = taken.iter().map(|taken| taken.id.as_str()).collect();
        let missing = sent.tracks.iter().filter(|id| !ids.contains(id.as_str())).count();
        println!(
            "{:<10} has {} distinct events; of those answered OK {missing} are missing",
            vendor.name(),
            taken.len()
        );
        // An identify that was sent again counts twice there.
        let again = usize::try_from(sent.lost_answers)?;
        exact &= missing == 0 && (tracks + identifies..=tracks + identifies + again).contains(&taken.len());
    }
    anyhow::ensure!(exact && code == Some(0), "the balance is not exact");
    println!("nothing was lost");
    Ok(())
}

struct Sent {
    /// Ids of tracks that were answered OK.
    tracks: HashSet<String>,
    identifies: usize,
    /// Calls whose answer was lost, and which were made again.
    lost_answers: u32,
}

async fn send(addr: String, is_done: watch::Receiver<bool>) -> anyhow::Result<Sent> {
    let channel = Channel::from_shared(format!("http://{addr}"))?.connect_lazy();
    let mut client = AnalyticsServiceClient::new(channel);
    let start = Instant::now();
    let mut sent = Sent { tracks: HashSet::new(), identifies: 0, lost_answers: 0 };
    for number in 0_u32.. {
        let due = start + Duration::from_secs(1) * number / RATE;
        sleep(due.saturating_duration_since(Instant::now())).await;
        if *is_done.borrow() {
            break;
        }
        let event_id = uuid::Uuid::now_v7().to_string();
        let mut is_lost = false;
        while send_one(&mut client, number, event_id.clone()).await.is_err() {
            is_lost = true;
            sleep(Duration::from_millis(20)).await;
        }
        sent.lost_answers += u32::from(is_lost);
        if is_identify(number) {
            sent.identifies += 1;
        } else {
            sent.tracks.insert(event_id);
        }
    }
    Ok(sent)
}
