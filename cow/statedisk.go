// The disk under the state directory, as far as what outlives the machine needs it:
// few calls, so that tests can record every one of them, lose power between any two,
// and make each fail or hang.

package cow

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// stateDisk is a file system. Nothing that its methods do is durable on return: a file's
// content is after its Sync, what a directory says after syncDir, and what was not
// made durable may be there after a loss of power or not, in whatever order it came.
type stateDisk interface {
	// open opens the regular file at path. With create set it makes the file, or
	// empties the one that is there.
	open(path string, create bool) (durableFile, error)

	// rename puts what is at from in the place of what is at to, if anything is.
	rename(from, to string) error

	// remove removes a file; fs.ErrNotExist where there is none.
	remove(path string) error

	// removeAll removes a directory with all that is in it, if it is there.
	removeAll(dir string) error

	// mkdir makes a directory; fs.ErrExist where there is one.
	mkdir(dir string) error

	// syncDir makes durable which names are in dir.
	syncDir(dir string) error
}

// durableFile is a file of a stateDisk.
type durableFile interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	Close() error
}

// hostDisk is the host's file system.
type hostDisk struct{}

func (hostDisk) open(path string, create bool) (durableFile, error) {
	// Whatever stands there instead of a file must not be waited for.
	flag := os.O_RDWR | syscall.O_NONBLOCK
	if create {
		flag |= os.O_CREATE | os.O_TRUNC
	}
	f, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return nil, err // not a nil *os.File in an interface
	}
	return f, nil
}

func (hostDisk) rename(from, to string) error { return os.Rename(from, to) }
func (hostDisk) remove(path string) error     { return os.Remove(path) }
func (hostDisk) removeAll(dir string) error   { return os.RemoveAll(dir) }
func (hostDisk) mkdir(dir string) error       { return os.Mkdir(dir, 0o700) }

func (hostDisk) syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// removeFile removes the file at path, if it is there.
func removeFile(disk stateDisk, path string) error {
	if err := disk.remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// inTheWay says whether err may be of a directory where a file belongs.
func inTheWay(err error) bool {
	return errors.Is(err, syscall.EISDIR) || errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST)
}

// setAside makes room where somebody put a directory in the place of a file of ours: an
// empty one is removed. What has content may be wanted, and gets another name beside it,
// to; that is empty where there is no such directory any more. Durable is none of it.
func setAside(disk stateDisk, path string) (to string, err error) {
	f, err := disk.open(path, false)
	switch {
	case err == nil:
		return "", f.Close()
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case !errors.Is(err, syscall.EISDIR):
		return "", err
	}
	if err = disk.remove(path); !inTheWay(err) {
		return "", err
	}
	// What has such a name already stays: a directory replaces no file, and only an empty
	// directory.
	for k := 1; k < 100 && err != nil; k++ {
		to = fmt.Sprintf("%s.aside-%d", path, k)
		err = disk.rename(path, to)
	}
	return to, err
}

// replaceFile puts a file with what write writes in the place of what is at path,
// durably, or leaves that as it is: after an error it is one or the other.
func replaceFile(disk stateDisk, path string, write func(durableFile) error) error {
	f, err := disk.open(path+".new", true)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = disk.rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(err, disk.remove(path+".new"))
	}
	return disk.syncDir(filepath.Dir(path))
}

// makeDir makes dir, which is top or below it, and what is missing above it, and sees
// to it that a loss of power takes none of the names down to it away: also those that
// somebody made who did not live to do that.
func makeDir(disk stateDisk, top, dir string) error {
	err := disk.mkdir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeDir(disk, top, filepath.Dir(dir)); err != nil {
			return err
		}
		err = disk.mkdir(dir)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for above := filepath.Dir(dir); ; above = filepath.Dir(above) {
		err := disk.syncDir(above)
		if len(above) >= len(top) && err != nil {
			return err
		}
		if len(above) < len(top) {
			if errors.Is(err, fs.ErrPermission) {
				return nil // not ours: who made top has to have done it
			}
			return err
		}
	}
}
