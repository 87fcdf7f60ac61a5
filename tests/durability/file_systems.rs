//! File systems that lack what a local disk has: locks, or syncing a directory.
//! `strace` lets the calls fail as those do.

use analytics_relay::{proto::v1::Durability, providers::sandbox::Vendor};
use tokio::process::Command;

use crate::{
    harness::{Observer, Relay, Setup, lines_on_disk, not_run},
    oracle::{Draft, Oracle},
    relays::{Figures, all, durable, fault, settle},
    syscalls::strace,
};

/// The relay's command, with every call of one name failing in every thread.
fn lacking(setup: &Setup, call: &str, error: &str, args: &[&str]) -> Command {
    let (trace, fail) = (format!("trace={call}"), format!("inject={call}:error={error}"));
    let mut command = setup.command_of(strace().unwrap());
    // The relay stays our child.
    command.args(["-D", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &fail]).arg(Setup::binary());
    command.args(args);
    command
}

#[tokio::test]
async fn without_locks_a_relay_in_memory_starts_and_keeps_its_dead_letters() {
    if strace().is_none() {
        return not_run("strace");
    }
    for error in ["ENOLCK", "ENOSYS"] {
        let mut setup = Setup::new().await;
        setup.set("MAX_RETRY_ATTEMPTS", "1");
        all(&setup, fault("503").as_ref());
        let relay = Relay::spawn(lacking(&setup, "flock", error, &[])).await;
        relay
            .log(
                "the file system of DATA_DIR has no locks (flock), so nothing keeps a second relay away: \
give each relay a directory of its own",
            )
            .await;
        let mut observer = Observer::default();
        observer.tracks(&mut relay.client(), 10).await;
        for vendor in Vendor::ALL {
            relay.dead_lettered(vendor, 10).await;
        }
        let ended = relay.terminate().await;
        observer.check_balance(&setup, &ended);
        assert_eq!(lines_on_disk(&setup.data_dir().join("dead-letters/segment")).len(), 10);

        all(&setup, None);
        let output = lacking(&setup, "flock", error, &["dead-letters", "replay"]).output().await.unwrap();
        let (out, err) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(output.status.success() && out.contains("delivered 10"), "{out}{err}");
        assert!(err.contains("see that no second replay is running"), "{err}");
    }
}

#[tokio::test]
async fn without_locks_no_log_is_written_and_the_reason_is_told() {
    if strace().is_none() {
        return not_run("strace");
    }
    let setup = durable("synced").await;
    let output = lacking(&setup, "flock", "ENOLCK", &[]).output().await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in ["SPOOL_DIR", "spool cannot be locked", "NFS 4", "DURABILITY=memory", "No locks available"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    // A lock that fails for another reason ends it in memory mode too.
    let setup = Setup::new().await;
    let output = lacking(&setup, "flock", "EIO", &[]).output().await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.contains("DATA_DIR"), "{said}");
}

/// A log in a directory that cannot be synced takes events all the same, says once
/// what that means, and loses none when the process is killed.
#[tokio::test]
async fn a_directory_that_cannot_be_synced_is_told_once_and_ends_nothing() {
    if strace().is_none() {
        return not_run("strace");
    }
    for error in ["EINVAL", "EOPNOTSUPP"] {
        let (setup, mut oracle, mut figures) =
            (durable("synced").await, Oracle::default(), Figures::default());
        let relay = Relay::spawn(lacking(&setup, "fsync", error, &[])).await;
        let mut client = relay.client();
        // Over the end of a segment, so that one is made and one removed.
        for _ in 0..20 {
            let mut draft = Draft::track(Durability::Synced);
            draft.filler = 7000;
            oracle.send(&mut client, draft).await;
        }
        assert_eq!(oracle.oks(), 20, "{:#?}", relay.logs().last());
        relay.log("segment removed: every provider has passed it").await;
        let told = "the file system cannot sync a directory: a power cut may take away files that were just \
made, with the events in them, synced ones too";
        assert_eq!(relay.logs().iter().filter(|line| line["message"] == told).count(), 1);
        figures.kill(relay).await;
        settle(&setup, &oracle, &mut figures).await;
    }
}
