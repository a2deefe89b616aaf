// The directories of a daemon and where they are by default: for root below
// /run and /var/lib, for others below what their session has.

package control

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// places are the directories that a daemon uses unless it is told others.
type places struct {
	mount, run, state string
	base              string // made by us where the session has none, else ""
}

// defaultPlaces are the places of this process' user. Nothing is created.
func defaultPlaces() places { return placesOf(os.Geteuid(), os.Getenv) }

func placesOf(uid int, env func(string) string) places {
	if uid == 0 {
		return places{mount: "/run/blksnap", run: "/run/blksnapd", state: "/var/lib/blksnap"}
	}
	var p places
	session := env("XDG_RUNTIME_DIR")
	if session == "" {
		p.base = filepath.Join("/tmp", "blksnap-"+strconv.Itoa(uid))
		session = p.base
	}
	p.mount = filepath.Join(session, "blksnap")
	p.run = filepath.Join(session, "blksnapd")
	p.state = stateOf(session, env)
	return p
}

// stateOf is where an unprivileged user keeps state. A user without a home, such
// as nobody, keeps it with what lives until the reboot: better than not to
// start.
func stateOf(session string, env func(string) string) string {
	if dir := env("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "blksnap")
	}
	home := env("HOME")
	err := prompt("home", home, func() error { _, err := os.Stat(home); return err })
	if home == "" || err != nil && !diskFails(err) {
		return filepath.Join(session, "blksnap-state")
	}
	return filepath.Join(home, ".local", "state", "blksnap")
}

// DefaultControl is where a command looks for the control socket if it is not
// told.
func DefaultControl() string {
	return filepath.Join(defaultPlaces().run, controlSocket)
}

// makePrivate creates the directory dir, for us alone, with what leads to it.
// One that exists must be ours and closed to the writes of others: who can
// write there could put a socket or a lock of his own in place of ours. Its
// mode stays as it is, since somebody chose it; what we put there is 0600.
func makePrivate(dir string) error {
	if err := makeParent(filepath.Dir(dir)); err != nil {
		return fmt.Errorf("create what %s is in: %w", dir, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create directory: %w", err)
	}
	return checkPrivate(dir)
}

// makeParent creates a directory with what leads to it. Where a name is taken that cannot be
// looked at, the error is why: a disk that fails, or a symbolic link to nowhere.
func makeParent(dir string) error {
	err := os.MkdirAll(dir, 0o755)
	if errors.Is(err, fs.ErrExist) {
		if _, why := os.Stat(dir); why != nil {
			return why
		}
	}
	return err
}

// checkPrivate refuses a directory that is not ours or that others can write
// to. A symbolic link counts if it is our own: it leads where we want to.
func checkPrivate(dir string) error {
	st, err := os.Lstat(dir)
	if err == nil && st.Mode()&fs.ModeSymlink != 0 && ownedByUs(st) {
		st, err = os.Stat(dir)
	}
	switch {
	case err != nil:
		return fmt.Errorf("look at directory: %w", err)
	case !st.IsDir():
		return fmt.Errorf("%s is not a directory", dir)
	case !ownedByUs(st):
		return fmt.Errorf("directory %s belongs to user %d, not to us", dir, st.Sys().(*syscall.Stat_t).Uid)
	case st.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("directory %s is open to the writes of others (mode %04o)", dir, st.Mode().Perm())
	}
	return nil
}

func ownedByUs(st fs.FileInfo) bool {
	return int(st.Sys().(*syscall.Stat_t).Uid) == os.Geteuid()
}
