//! A server of its own for the tests, from the machine's binaries: on a socket in a directory
//! that goes with it, when the process of the tests is over or killed.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

/// So long a server may take to start.
const START_TIME_MAX: Duration = Duration::from_secs(60);

/// A server that runs.
pub(crate) struct Server {
    dir: PathBuf,
    /// What watches it ends it when this is closed.
    _watched: Option<ChildStdin>,
    _watcher: Child,
}

/// Where the binaries are, of the newest version.
pub(crate) fn binaries() -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|bin| bin.join("initdb").exists() && bin.join("postgres").exists())
        .collect();
    found.sort();
    found.pop()
}

/// The user and group that a server may run as, if this is root, as which none runs.
fn other_user() -> Option<(u32, u32)> {
    if fs::metadata("/proc/self").ok()?.uid() != 0 {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    let of = |name: &str| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2);
        Some((ids.next()?.parse().ok()?, ids.next()?.parse().ok()?))
    };
    of("postgres").or_else(|| of("nobody"))
}

fn command(program: &Path, user: Option<(u32, u32)>) -> String {
    match user {
        None => program.display().to_string(),
        Some((user, group)) => {
            format!("setpriv --reuid={user} --regid={group} --clear-groups {}", program.display())
        }
    }
}

impl Server {
    /// Starts one; `None` where there is none on this machine.
    pub(crate) fn start() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (bin, user) = (binaries()?, other_user());
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("relay-pg-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        if let Some((user, group)) = user {
            chown(&dir, Some(user), Some(group)).unwrap();
        }
        let made = Command::new("sh")
            .current_dir(&dir)
            .arg("-c")
            .arg(format!(
                "{} -D {}/data -U postgres -A trust -E UTF8 --locale=C --no-sync >{}/initdb.log 2>&1",
                command(&bin.join("initdb"), user),
                dir.display(),
                dir.display()
            ))
            .status()
            .unwrap();
        assert!(made.success(), "{}", fs::read_to_string(dir.join("initdb.log")).unwrap_or_default());
        let watched = format!(
            "{} -D {dir}/data -k {dir} -h '' -c fsync=off -c full_page_writes=off -c synchronous_commit=off \
            -c max_connections=100 -c shared_buffers=64MB -c autovacuum=off >{dir}/log 2>&1 & \
            P=$!; read _; kill -QUIT $P; wait $P; rm -rf {dir}",
            command(&bin.join("postgres"), user),
            dir = dir.display()
        );
        let mut watcher =
            Command::new("sh").current_dir("/").arg("-c").arg(watched).stdin(Stdio::piped()).spawn().unwrap();
        let server = Self { _watched: watcher.stdin.take(), _watcher: watcher, dir };
        let since = Instant::now();
        while !server.is_ready(&bin) {
            assert!(since.elapsed() < START_TIME_MAX, "the server does not start: {}", server.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(server)
    }

    fn is_ready(&self, bin: &Path) -> bool {
        let asked = Command::new(bin.join("pg_isready")).arg("-q").arg("-h").arg(&self.dir).status();
        asked.is_ok_and(|status| status.success())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// The URL of a database, in a schema of it.
    pub(crate) fn url(&self, schema: &str) -> String {
        format!("{}?options=-csearch_path%3D{schema}", self.database_url("postgres"))
    }

    /// The URL of a database.
    pub(crate) fn database_url(&self, database: &str) -> String {
        let host = self.dir.display().to_string().replace('/', "%2F");
        format!("postgres://postgres@{host}/{database}")
    }

    /// Kills it as a crash would, with all that works for it.
    pub(crate) fn kill(&self) {
        let pids = fs::read_to_string(self.dir.join("data/postmaster.pid")).unwrap();
        let pid = pids.lines().next().unwrap();
        // Those that work for it see that it is gone.
        assert!(Command::new("kill").args(["-KILL", pid]).status().unwrap().success());
    }

    /// The id of the memory that its processes share.
    fn shared_memory(&self) -> String {
        let pids = fs::read_to_string(self.dir.join("data/postmaster.pid")).unwrap();
        let line = pids.lines().nth(6).unwrap_or_default();
        line.split_whitespace().nth(1).unwrap_or_default().to_owned()
    }

    /// Starts it again after it was killed.
    pub(crate) fn restart(mut self) -> Self {
        let (bin, user) = (binaries().unwrap(), other_user());
        let dir = self.dir.display();
        // What watched the first would take the directory away; and it is what buries it.
        let _ = self._watcher.kill();
        let _ = self._watcher.wait();
        // Until nobody has its memory any more.
        let shared = self.shared_memory();
        while is_attached(&shared) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let watched = format!(
            "rm -f {dir}/data/postmaster.pid {dir}/.s.PGSQL.*; {} -D {dir}/data -k {dir} -h '' -c autovacuum=off >>{dir}/log 2>&1 & \
            P=$!; read _; kill -QUIT $P; wait $P; rm -rf {dir}",
            command(&bin.join("postgres"), user),
        );
        let mut watcher =
            Command::new("sh").current_dir("/").arg("-c").arg(watched).stdin(Stdio::piped()).spawn().unwrap();
        (self._watched, self._watcher) = (watcher.stdin.take(), watcher);
        let since = Instant::now();
        while !self.is_ready(&bin) {
            assert!(since.elapsed() < START_TIME_MAX, "the server does not start again: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        self
    }
}

fn is_attached(shared: &str) -> bool {
    let all = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let mut ids = all.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    ids.any(|line| line.get(1) == Some(&shared) && line.get(6).is_some_and(|attached| *attached != "0"))
}

/// The one that tests share.
pub(crate) static SERVER: LazyLock<Option<Server>> = LazyLock::new(Server::start);

/// As the relay's tests say it.
pub(crate) fn not_run(what: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("not run: {what} ({test})\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    if let Some(list) = std::env::var_os("RELAY_NOT_RUN_LIST") {
        let mut list = fs::OpenOptions::new().create(true).append(true).open(list).unwrap();
        list.write_all(line.as_bytes()).unwrap();
    }
    assert!(!std::env::var("RELAY_REQUIRE").is_ok_and(|required| required == "all"), "{line}");
}
