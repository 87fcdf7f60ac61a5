//! The file: its tables, how it is opened, and what becomes of one that is damaged.

use std::{
    fs::{self, File, TryLockError},
    io::ErrorKind,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ring::rand::SecureRandom;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::{StoreError, error::at_second_look};

/// The tables' version, in `user_version`.
pub(crate) const VERSION: i64 = 2;
/// Below this SQLite may lose commits when its log starts over.
const SQLITE_MIN: i32 = 3_053_000;

/// The tables of version 1, as `docs` shows them. `n` counts batches, over all tables.
pub(crate) const TABLES: &str = "
CREATE TABLE meta(k TEXT PRIMARY KEY, v BLOB NOT NULL) STRICT;
CREATE TABLE tenant(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE site(id INTEGER PRIMARY KEY, tenant INTEGER NOT NULL, source TEXT NOT NULL, UNIQUE(tenant, source)) STRICT;

-- What came lately: a row for each batch (n) and site.
CREATE TABLE hot(id INTEGER PRIMARY KEY, n INTEGER NOT NULL, site INTEGER NOT NULL, events BLOB NOT NULL) STRICT;
-- The ids of the last events: a row for each batch, 8 bytes an event.
CREATE TABLE seen(n INTEGER PRIMARY KEY, ids BLOB NOT NULL) STRICT;

-- Events by columns; bytes: of memory, about; crc: of the other
-- numbers, the id first, 8 bytes each, little endian. Ids of blocks are never used twice.
CREATE TABLE block(id INTEGER PRIMARY KEY AUTOINCREMENT, site INTEGER NOT NULL, rows INTEGER NOT NULL, bytes INTEGER NOT NULL, first_ms INTEGER NOT NULL, last_ms INTEGER NOT NULL, bots INTEGER NOT NULL, sessions INTEGER NOT NULL, crc INTEGER NOT NULL) STRICT;
CREATE INDEX block_site ON block(site, last_ms);
-- k = block id << 8 | number of the column.
CREATE TABLE col(k INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT;

-- Who is who: facts, and what follows from them.
CREATE TABLE user(tenant INTEGER NOT NULL, id TEXT NOT NULL, first_ms INTEGER NOT NULL, PRIMARY KEY(tenant, id)) STRICT, WITHOUT ROWID;
CREATE TABLE link(tenant INTEGER NOT NULL, device TEXT NOT NULL, user TEXT NOT NULL, first_ms INTEGER NOT NULL, PRIMARY KEY(tenant, device, user)) STRICT, WITHOUT ROWID;
CREATE INDEX link_user ON link(tenant, user);
CREATE TABLE alias(tenant INTEGER NOT NULL, previous TEXT NOT NULL, user TEXT NOT NULL, first_ms INTEGER NOT NULL, PRIMARY KEY(tenant, previous, user)) STRICT, WITHOUT ROWID;
CREATE INDEX alias_user ON alias(tenant, user);
CREATE TABLE apart(tenant INTEGER NOT NULL, device TEXT NOT NULL, user TEXT NOT NULL, PRIMARY KEY(tenant, device, user)) STRICT, WITHOUT ROWID;
CREATE TABLE traits(tenant INTEGER NOT NULL, is_user INTEGER NOT NULL, id TEXT NOT NULL, traits TEXT NOT NULL, PRIMARY KEY(tenant, is_user, id)) STRICT, WITHOUT ROWID;
CREATE TABLE owner(tenant INTEGER NOT NULL, who INTEGER NOT NULL, root INTEGER NOT NULL, until_ms INTEGER NOT NULL, n INTEGER NOT NULL, PRIMARY KEY(tenant, who)) STRICT, WITHOUT ROWID;
CREATE INDEX owner_n ON owner(tenant, n);
";

/// What changed since: each text makes a file of its version one of the next.
const MIGRATIONS: [&str; VERSION as usize - 1] = ["
-- When somebody was last seen, to the hour; of what was noted before, never.
ALTER TABLE user ADD COLUMN last_ms INTEGER NOT NULL DEFAULT -9223372036854775808;
ALTER TABLE link ADD COLUMN last_ms INTEGER NOT NULL DEFAULT -9223372036854775808;
-- Who put two ids apart, why and when.
ALTER TABLE apart ADD COLUMN operator TEXT NOT NULL DEFAULT '';
ALTER TABLE apart ADD COLUMN reason TEXT NOT NULL DEFAULT '';
ALTER TABLE apart ADD COLUMN at_ms INTEGER NOT NULL DEFAULT 0;
-- What was decided about who is who, by an event or an operator. `what` is the place of a decision in `DECISIONS`.
CREATE TABLE identity_log(tenant INTEGER NOT NULL, seq INTEGER NOT NULL, at_ms INTEGER NOT NULL, event TEXT, operator TEXT, reason TEXT, what INTEGER NOT NULL, origin TEXT NOT NULL, user TEXT NOT NULL, before TEXT, PRIMARY KEY(tenant, seq)) STRICT, WITHOUT ROWID;
"];

/// So long is waited for others who lock the file.
pub(crate) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// `secure_delete`: what goes, be it because it became a block, leaves nothing behind of
/// somebody who is erased later.
const WRITER: &str = "
PRAGMA synchronous=FULL; PRAGMA cache_size=-32768; PRAGMA mmap_size=0;
PRAGMA wal_autocheckpoint=2000; PRAGMA journal_size_limit=67108864;
PRAGMA temp_store=MEMORY; PRAGMA trusted_schema=OFF; PRAGMA secure_delete=ON;";

const READER: &str = "
PRAGMA query_only=ON; PRAGMA cache_size=-8192; PRAGMA mmap_size=0;
PRAGMA temp_store=MEMORY; PRAGMA trusted_schema=OFF;";

/// A file that is this process's to write.
pub(crate) struct Opened {
    pub(crate) writer: Connection,
    /// Keeps other processes from writing, as long as it is there.
    pub(crate) lock: File,
    /// Where a file went that could not be read.
    pub(crate) set_aside: Option<PathBuf>,
}

/// Opens a file for writing, or makes it. `load` reads all of it that must be readable; a
/// file that it cannot read because it is damaged is set aside, and a new one begun.
pub(crate) fn open<T>(
    path: &Path,
    mut load: impl FnMut(&mut Connection) -> Result<T, StoreError>,
) -> Result<(Opened, T), StoreError> {
    check_version()?;
    let lock = lock(path)?;
    let mut attempt = || {
        let mut writer = open_writer(path)?;
        let loaded = load(&mut writer)?;
        Ok((writer, loaded))
    };
    match at_second_look(&mut attempt) {
        Ok((writer, loaded)) => Ok((Opened { writer, lock, set_aside: None }, loaded)),
        Err(StoreError::Damaged(why)) => {
            let aside = set_aside(path)?;
            tracing::error!(file = %path.display(), aside = %aside.display(), why, "store damaged, set aside; starting an empty one");
            let (writer, loaded) = attempt()?;
            Ok((Opened { writer, lock, set_aside: Some(aside) }, loaded))
        }
        Err(error) => Err(error),
    }
}

fn check_version() -> Result<(), StoreError> {
    let got = rusqlite::version_number();
    if got < SQLITE_MIN {
        return Err(StoreError::invalid("SQLite", got, format!("at least {SQLITE_MIN}, as is bundled")));
    }
    Ok(())
}

/// So long it is waited for whoever has just let go of a store: a process that is being
/// started has all that its parent had open, until its program begins.
const LOCK_WAIT: Duration = Duration::from_secs(1);

fn lock(path: &Path) -> Result<File, StoreError> {
    let unavailable = |why: String| StoreError::Unavailable(format!("{}: {why}", path.display()));
    let file = File::options().create(true).truncate(false).write(true).open(beside(path, "lock"));
    let file = file.map_err(|error| unavailable(error.to_string()))?;
    let since = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if since.elapsed() < LOCK_WAIT => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(TryLockError::WouldBlock) => return Err(unavailable("another process writes to it".into())),
            Err(TryLockError::Error(error)) => {
                return Err(unavailable(format!("it cannot be locked: {error}")));
            }
        }
    }
}

/// True while some process, this one too, has a file open for writing. Changes nothing.
pub fn is_in_use(path: &Path) -> bool {
    let lock = File::options().write(true).open(beside(path, "lock"));
    lock.is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

/// A file beside the store's.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("-{end}"));
    name.into()
}

pub(crate) fn open_writer(path: &Path) -> Result<Connection, StoreError> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // Before the first page is written.
    connection.execute_batch("PRAGMA page_size=8192;")?;
    let mode: String = connection.query_row("PRAGMA journal_mode=WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        let want = "\"wal\": questions and writes beside each other; this file system may not be able to";
        return Err(StoreError::invalid("the store's journal", mode, want));
    }
    connection.execute_batch(WRITER)?;
    migrate(&mut connection)?;
    Ok(connection)
}

fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    match found {
        // On a full disk nothing can be written, and all can be read.
        VERSION => return Ok(()),
        0 => {
            transaction.execute_batch(TABLES)?;
            for migration in MIGRATIONS {
                transaction.execute_batch(migration)?;
            }
            let mut secret = [0; 32];
            let filled = ring::rand::SystemRandom::new().fill(&mut secret);
            filled.map_err(|_| StoreError::Unavailable("the system has no randomness".into()))?;
            transaction.execute("INSERT INTO meta(k, v) VALUES ('secret', ?1)", [&secret[..]])?;
        }
        1..=VERSION => {
            for migration in &MIGRATIONS[found as usize - 1..] {
                transaction.execute_batch(migration)?;
            }
        }
        newer => {
            let want = format!("at most {VERSION}: it was written by a newer relay");
            return Err(StoreError::invalid("the store's version", newer, want));
        }
    }
    transaction.execute_batch(&format!("PRAGMA user_version={VERSION}"))?;
    Ok(transaction.commit()?)
}

/// Opens a file for reading, also beside a process that writes.
pub(crate) fn open_reader(path: &Path) -> Result<Connection, StoreError> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch(READER)?;
    connection.set_prepared_statement_cache_capacity(32);
    connection.set_transaction_behavior(rusqlite::TransactionBehavior::Deferred);
    Ok(connection)
}

/// The secrets of a file: for keys, and for telling texts apart.
pub(crate) fn secrets(connection: &Connection) -> Result<([u8; 16], [u8; 16]), StoreError> {
    let secret: Vec<u8> =
        connection.query_row("SELECT v FROM meta WHERE k = 'secret'", [], |row| row.get(0))?;
    let halves =
        secret.split_at_checked(16).and_then(|(one, two)| Some((one.try_into().ok()?, two.try_into().ok()?)));
    halves.ok_or_else(|| StoreError::Damaged("its secret is cut".into()))
}

/// Moves a file and what belongs to it out of the way; its log first: a crash between them
/// must not leave a log without its file, which the next to open the store would delete.
fn set_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let aside = beside(path, &format!("damaged-{now}"));
    let failed = |error: std::io::Error| StoreError::Unavailable(format!("{}: {error}", path.display()));
    for end in ["-wal", "-shm", ""] {
        let with = |path: &Path| {
            let mut name = path.as_os_str().to_owned();
            name.push(end);
            PathBuf::from(name)
        };
        match fs::rename(with(path), with(&aside)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    sync_dir(path).map_err(failed)?;
    Ok(aside)
}

/// What names there are in the directory of a file outlives a power cut.
pub(crate) fn sync_dir(path: &Path) -> std::io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    match File::open(dir.unwrap_or(Path::new(".")))?.sync_all() {
        // Some file systems cannot.
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

/// The tables of who is who.
const IDENTITY: [&str; 7] = ["user", "link", "alias", "apart", "traits", "owner", "identity_log"];

/// Reads all of the tables of who is who, and begins them anew if they are damaged: what is
/// known about somebody is worth less than all events.
pub(crate) fn check_identity(connection: &mut Connection) -> Result<(), StoreError> {
    let check = |connection: &Connection| {
        for table in IDENTITY {
            let sql = format!("SELECT count(*) FROM {table} NOT INDEXED");
            connection.query_row(&sql, [], |row| row.get::<_, i64>(0))?;
        }
        Ok(())
    };
    match check(connection) {
        Err(StoreError::Damaged(why)) => {
            tracing::error!(
                why,
                "who is who is damaged in the store; it begins anew, and an import of an export brings it back"
            );
            begin_identity_anew(connection)
        }
        done => done,
    }
}

fn begin_identity_anew(connection: &mut Connection) -> Result<(), StoreError> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let is_its = format!("tbl_name IN ('{}') AND sql IS NOT NULL", IDENTITY.join("', '"));
    let sql = format!("SELECT sql FROM sqlite_schema WHERE {is_its} ORDER BY type DESC, name");
    let texts: Vec<String> =
        transaction.prepare(&sql)?.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    // Their pages cannot be given back, as they cannot be read: they stay until the file is
    // written anew.
    transaction.execute_batch("PRAGMA writable_schema=ON")?;
    transaction
        .execute(&format!("DELETE FROM sqlite_schema WHERE tbl_name IN ('{}')", IDENTITY.join("', '")), [])?;
    transaction.execute_batch("PRAGMA writable_schema=RESET")?;
    for text in texts {
        transaction.execute_batch(&text)?;
    }
    Ok(transaction.commit()?)
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::Error;
        let is_damage = match &error {
            // A value of a wrong type is one that this did not write.
            Error::FromSqlConversionFailure(..)
            | Error::IntegralValueOutOfRange(..)
            | Error::InvalidColumnType(..)
            | Error::Utf8Error(..)
            | Error::QueryReturnedNoRows => true,
            error => matches!(
                error.sqlite_error_code(),
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
            ),
        };
        if is_damage { Self::Damaged(error.to_string()) } else { Self::Unavailable(error.to_string()) }
    }
}
