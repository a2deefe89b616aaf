// Keeping others away from an origin, and finding out who is there already.

package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// QEMU locks bytes of an image: for each permission that it uses one byte, and
// one more for each that it does not share. Two users clash where one uses what
// the other does not share. (QEMU, block/file-posix.c.)
const (
	qemuUses     = 100
	qemuUnshared = 200

	permRead           = 0 // consistent read
	permWrite          = 1
	permWriteUnchanged = 2
	permResize         = 3
)

// What we do with an origin: we read, write and may resize it, and let others at
// most read it.
var (
	uses     = []int64{permRead, permWrite, permWriteUnchanged, permResize}
	unshared = []int64{permWrite, permWriteUnchanged, permResize}
)

// lockOrigin locks f until it is closed. EBUSY where somebody else is using it.
func lockOrigin(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("is locked by another program, perhaps another blksnap: %w", syscall.EBUSY)
	}
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	// First lock, then look: of two who come at once, one at least sees the other.
	for _, p := range uses {
		if err := lockByte(f, qemuUses+p); err != nil {
			return err
		}
	}
	for _, p := range unshared {
		if err := lockByte(f, qemuUnshared+p); err != nil {
			return err
		}
	}
	for _, p := range uses {
		if err := freeByte(f, qemuUnshared+p); err != nil {
			return err
		}
	}
	for _, p := range unshared {
		if err := freeByte(f, qemuUses+p); err != nil {
			return err
		}
	}
	return nil
}

// lockByte takes a shared lock, which says "here I am" and clashes with nobody
// who does the same. File systems without such locks are left unlocked, as QEMU
// does.
func lockByte(f *os.File, at int64) error {
	lk := unix.Flock_t{Type: unix.F_RDLCK, Start: at, Len: 1}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
	switch {
	case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOLCK), errors.Is(err, unix.ENOTSUP):
		return nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return errQEMU
	}
	return fmt.Errorf("lock: %w", err)
}

// freeByte fails with EBUSY if anybody else has locked the byte.
func freeByte(f *os.File, at int64) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
		return nil // no such locks here: nobody can hold one
	}
	if lk.Type != unix.F_UNLCK {
		return errQEMU
	}
	return nil
}

var errQEMU = fmt.Errorf("is in use by QEMU or a program that locks like it: %w", syscall.EBUSY)

// loopBackedBy returns the loop device that a file backs, or that a loop device
// is a partition of; empty if there is none.
func loopBackedBy(st fs.FileInfo) (string, error) {
	if !st.Mode().IsRegular() {
		return "", nil
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // detached meanwhile
		}
		backing, err := os.Stat(strings.TrimSuffix(string(b), "\n"))
		if err == nil && os.SameFile(st, backing) {
			return "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(f))), nil
		}
	}
	return "", nil
}
