// Making a part in a file.

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// minDefaultLimit is the smallest limit that is chosen for a user who gave none.
const minDefaultLimit = 16 << 20

// openOrCreate also says whether it created the file.
func openOrCreate(path string) (f *os.File, created bool, err error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, false, fmt.Errorf("its directory %s does not exist", filepath.Dir(path))
		}
		return f, err == nil, cause(err)
	case err != nil:
		return nil, false, cause(err)
	case info.Mode()&fs.ModeDevice != 0:
		return nil, false, fmt.Errorf("it is a device; use dev:%s", path)
	case !info.Mode().IsRegular():
		return nil, false, fmt.Errorf("it is not a regular file (%s)", info.Mode())
	}
	f, err = os.OpenFile(path, os.O_RDWR, 0)
	return f, false, cause(err)
}

// lock takes the lock that keeps a second user away. It falls when the last
// thread of this process that uses the file is gone.
func (p *filePart) lock() error {
	err := p.control(func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrInUse
	}
	return err
}

// lockedElsewhere says whether another process holds a lock on part of the file,
// as QEMU does on the images that it uses.
func (p *filePart) lockedElsewhere() bool {
	l := unix.Flock_t{Type: unix.F_WRLCK}
	err := p.control(func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l) })
	return err == nil && l.Type != unix.F_UNLCK
}

// create empties the file and makes it a snapstore.
func (p *filePart) create(limit int64) (h header, err error) {
	if limit == 0 {
		if limit, err = p.defaultLimit(); err != nil {
			return header{}, err
		}
	}
	if err := p.f.Truncate(0); err != nil {
		return header{}, cause(err)
	}
	h = header{id: uuid.New(), limit: limit}
	if err := p.writeHeader(h); err != nil {
		return header{}, err
	}
	return h, syncDir(filepath.Dir(p.f.Name()))
}

// defaultLimit is half of the space that is free once the file is empty.
func (p *filePart) defaultLimit() (int64, error) {
	info, err := p.f.Stat()
	if err != nil {
		return 0, cause(err)
	}
	free, err := p.Avail()
	if err != nil {
		return 0, err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		free += st.Blocks * 512
	}
	limit := free / 2 / SlotSize * SlotSize
	if limit < minDefaultLimit {
		return 0, noRoom(fmt.Sprintf("its file system has %d bytes free, half of which is less than %s: free some or give a limit",
			free, FormatSize(minDefaultLimit)))
	}
	return limit, nil
}

// noRoom is ENOSPC in our own words.
type noRoom string

func (e noRoom) Error() string { return string(e) }
func (noRoom) Unwrap() error   { return syscall.ENOSPC }

// syncDir makes a name in dir durable, where the file system has a way to.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	err = d.Sync()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}
