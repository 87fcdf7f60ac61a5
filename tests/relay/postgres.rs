//! A PostgreSQL of a test's own: on a free port, with a directory of its own; it can be
//! stopped, killed and started again, and is asked with psql, which no relay stands between.

use std::{
    env, fs,
    io::Write,
    net::{Ipv4Addr, TcpListener},
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::harness::not_run;

const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// `nobody` and its group: PostgreSQL does not run as root.
const NOBODY: u32 = 65_534;
const PROGRAMS: [&str; 3] = ["initdb", "postgres", "psql"];
/// The relay's user and password. Whoever finds one anywhere has found a leak.
pub(crate) const USER: &str = "canary_user";
pub(crate) const PASSWORD: &str = "canary-of-postgres";

/// See the module.
pub(crate) struct Postgres {
    dir: TempDir,
    programs: PathBuf,
    port: u16,
    settings: Vec<String>,
    running: Option<Child>,
}

impl Postgres {
    /// Starts one with these settings (`max_connections=8`), in which [`USER`] has the
    /// database `relay`. Says what is not run where the machine has none.
    pub(crate) fn start(settings: &[&str]) -> Option<Self> {
        let Some(programs) = programs() else {
            not_run("the store in PostgreSQL: initdb, postgres, psql");
            return None;
        };
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let mut postgres =
            Self { dir: tempfile::tempdir().unwrap(), programs, port, settings, running: None };
        if is_root() {
            chown(postgres.dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let mut initdb = postgres.command("initdb");
        initdb.arg("-D").arg(postgres.data()).args([
            "-U",
            "postgres",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ]);
        initdb.args(["--auth-local=trust", "--auth-host=scram-sha-256"]);
        let made = initdb.output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        postgres.go_on();
        postgres.sql_in("postgres", &format!("CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'"));
        postgres.sql_in("postgres", &format!("CREATE DATABASE relay OWNER {USER}"));
        Some(postgres)
    }

    /// What the relay is told.
    pub(crate) fn url(&self) -> String {
        self.url_as(USER, PASSWORD, "relay")
    }

    pub(crate) fn url_as(&self, user: &str, password: &str, database: &str) -> String {
        format!("postgres://{user}:{password}@127.0.0.1:{}/{database}", self.port)
    }

    /// Starts it on its port, with all that it had, and waits until it answers.
    pub(crate) fn go_on(&mut self) {
        assert!(self.running.is_none(), "it runs");
        let begun = Instant::now();
        // What a server that was killed leaves behind may take a moment to end.
        loop {
            self.running = Some(self.spawn());
            if self.answers(begun) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{}", self.log());
            self.running = None;
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// A shell that ends it when nobody holds the shell's input any more: whoever kills the tests
    /// ends it too.
    fn spawn(&self) -> Child {
        let script = r#"exec 3<&0; "$@" 3<&- & P=$!; (read _ <&3; kill -QUIT $P) & exec 3<&-; wait $P"#;
        let mut server = self.command_of("sh".as_ref());
        server.args(["-c", script, "sh"]).arg(self.programs.join("postgres")).stdin(Stdio::piped());
        server.arg("-D").arg(self.data()).args(["-p", &self.port.to_string(), "-k"]).arg(self.dir.path());
        for setting in ["listen_addresses=127.0.0.1", "shared_buffers=32MB", "fsync=off"] {
            server.args(["-c", setting]);
        }
        self.settings.iter().for_each(|setting| {
            server.args(["-c", setting]);
        });
        let log = fs::File::options().create(true).append(true).open(self.log_file()).unwrap();
        server.stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    /// False if it has ended instead.
    fn answers(&mut self, begun: Instant) -> bool {
        while self.psql("postgres", "SELECT 1").is_err() {
            let has_ended =
                self.running.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(Some(_))));
            if has_ended {
                return false;
            }
            assert!(begun.elapsed() < PATIENCE, "{}", self.log());
            thread::sleep(LOOK_AGAIN);
        }
        true
    }

    /// Stops it as an operator does who cannot wait for clients.
    pub(crate) fn stop(&mut self) {
        self.end("INT");
    }

    /// Ends it, and each process that serves a client, in the middle of whatever they do.
    pub(crate) fn kill(&mut self) {
        self.end("KILL");
    }

    fn end(&mut self, signal: &str) {
        let mut child = self.running.take().expect("it runs");
        let file = fs::read_to_string(self.data().join("postmaster.pid")).unwrap();
        let server = file.lines().next().unwrap();
        let serving =
            fs::read_to_string(format!("/proc/{server}/task/{server}/children")).unwrap_or_default();
        signalled(signal, server);
        if signal == "KILL" {
            serving.split_whitespace().for_each(|process| signalled(signal, process));
        }
        // Not `wait`, which would close the shell's input first.
        while child.try_wait().unwrap().is_none() {
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// What a statement answers in the relay's database, as the superuser: a row a line, columns
    /// divided by `|`.
    pub(crate) fn sql(&self, statement: &str) -> String {
        self.sql_in("relay", statement)
    }

    fn sql_in(&self, database: &str, statement: &str) -> String {
        self.psql(database, statement).unwrap_or_else(|error| panic!("{statement}: {error}\n{}", self.log()))
    }

    fn psql(&self, database: &str, statement: &str) -> Result<String, String> {
        let mut psql = Command::new(self.programs.join("psql"));
        psql.env_clear().arg("-h").arg(self.dir.path()).args(["-p", &self.port.to_string()]);
        // Whoever makes a server read only can take it back.
        psql.env("PGOPTIONS", "-c default_transaction_read_only=off");
        psql.args(["-U", "postgres", "-d", database, "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement]);
        let answer = psql.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end().to_owned();
        if answer.status.success() { Ok(text(answer.stdout)) } else { Err(text(answer.stderr)) }
    }

    /// A client of the relay's name that does nothing but have a connection, until it is
    /// dropped.
    pub(crate) fn client(&self) -> Idle {
        let mut psql = Command::new(self.programs.join("psql"));
        psql.env_clear().arg("-XAtq").arg(self.url()).stdin(Stdio::piped()).stdout(Stdio::null());
        Idle(psql.stderr(Stdio::null()).spawn().unwrap())
    }

    /// One that says this first.
    pub(crate) fn client_that(&self, says: &str) -> Idle {
        let mut client = self.client();
        let input = client.0.stdin.as_mut().expect("it is piped");
        writeln!(input, "{says};").expect("it reads");
        client
    }

    /// All that the server has said.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn log_file(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn command(&self, program: &str) -> Command {
        self.command_of(&self.programs.join(program))
    }

    fn command_of(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", "/usr/bin:/bin").current_dir(self.dir.path());
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.running.is_some() {
            self.end("QUIT");
        }
    }
}

/// See [`Postgres::client`].
pub(crate) struct Idle(Child);

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn signalled(signal: &str, process: &str) {
    // It may have ended.
    let _ =
        Command::new("sh").args(["-c", &format!("kill -{signal} {process}")]).stderr(Stdio::null()).status();
}

/// Where the programs are: on the path, or where Debian has them, of the newest version.
fn programs() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .collect();
    versions.sort_by(|one, other| other.cmp(one));
    let has_all = |dir: &Path| PROGRAMS.iter().all(|program| dir.join(program).is_file());
    env::split_paths(&path).chain(versions.into_iter().map(|(_, dir)| dir)).find(|dir| has_all(dir))
}
