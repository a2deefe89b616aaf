// One disk under several names.
//
// A device keeps its history under its name, and trusts it when the origin is the disk
// that it was. A file that was served under another name meanwhile has a stamp of that.
// A block device has none, and neither has a file whose lease still runs: so who opens
// an origin tells all others that were the same disk, before it lets a write in. In the
// run directory the other's lease file says which name it was; of what outlives the
// machine the map goes, and with it the history.

package cow

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// sameDisk says whether now is what id was, in the same boot or in another, or one of them
// a partition of the other. Of block devices in another boot only their content tells.
func (id identity) sameDisk(now identity, sameBoot bool) bool {
	switch {
	case id.isFile() != now.isFile():
		return false
	case id.isFile():
		return id.ino == now.ino && (id.dev == now.dev || !sameBoot)
	case sameBoot:
		return id.diskSeq == now.diskSeq && (id.dev == now.dev || id.diskSeq != 0 && !(isPartition(id.dev) && isPartition(now.dev)))
	}
	return id.size == now.size && id.print == now.print
}

// isPartition says whether a block device is a part of another.
func isPartition(dev uint64) bool {
	_, err := os.Stat(fmt.Sprintf("/sys/dev/block/%d:%d/partition", unix.Major(dev), unix.Minor(dev)))
	return err == nil
}

// stampTells says whether what is written to a file from now on is stamped beyond the
// lease. The clock of stamps is some milliseconds late; after a clean end the lease is a
// stamp itself.
func stampTells(lease int64, clean bool, now time.Time) bool {
	if !clean {
		now = now.Add(-runLease)
	}
	return lease < now.UnixNano()
}

// tellOthers notes with each other device that was this disk that it is served under
// another name now.
func (d *Device) tellOthers() error {
	now, err := d.file.identify(false)
	if err != nil {
		return err
	}
	var errs []error
	for name := range othersIn(d.cat.dir, d.name) {
		if d.tellRun(filepath.Join(d.cat.deviceDir(name), "lease"), now) != nil {
			errs = append(errs, d.cat.doubt(name))
		}
	}
	err = d.tellStates(now)
	if errors.Is(err, errNoAnswer) {
		// It goes on. That another device may believe its old map if we are killed before, and
		// it gets this disk again, is no reason to let nobody write to it.
		d.cfg.Log.Error("cannot note yet that the origin has another name now", "err", err)
		err = nil
	}
	return errors.Join(append(errs, err)...)
}

// tellStates is tellState for all others; errNoAnswer where the state disk hangs.
func (d *Device) tellStates(now identity) error {
	if d.cat.stateless() != nil {
		return nil // it is noted with the origin, or the catalogue, that all that was there has ended
	}
	patience, limit := &d.cat.patience, d.cfg.PreserveLimit/2
	var names []string
	err := patience.call(limit, func() error {
		names = slices.Collect(othersIn(d.cat.state, d.name))
		return nil
	}, nil)
	if err != nil {
		return err // names may change yet
	}
	var errs []error
	looked := false
	for _, name := range names {
		tell := func() error { return d.tellState(name, now, looked) }
		err := patience.call(limit, tell, nil)
		if errors.Is(err, errLook) { // which is not for the state disk to wait for
			if now, err = d.file.identify(true); err == nil {
				looked = true
				err = patience.call(limit, tell, nil)
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// errLook says that only the content of a block device tells whether it is another.
var errLook = errors.New("the origin's content is to be looked at")

// othersIn yields the names of the devices but name that have something in dir.
func othersIn(dir, name string) func(func(string) bool) {
	return func(yield func(string) bool) {
		if dir == "" {
			return
		}
		entries, _ := os.ReadDir(filepath.Join(dir, "devices")) // who cannot be read trusts nothing
		for _, e := range entries {
			if e.IsDir() && e.Name() != name && !yield(e.Name()) {
				return
			}
		}
	}
}

// tellRun notes it in another device's lease file. It fails where that would have to be
// noted, or may have to be, and cannot.
func (d *Device) tellRun(path string, now identity) error {
	f, err := openInspected(path)
	if f == nil {
		return err // no lease, no trust
	}
	defer f.Close()
	b, err := f.head(leftAt + 8)
	if err != nil {
		return nil
	}
	info, err := decodeCheckpoint(b[:checkpointHeader])
	lease := int64(host.Uint64(b[leaseAt:]))
	if err != nil || !info.origin.sameDisk(now, true) || now.isFile() && stampTells(lease, host.Uint64(b[leftAt:]) != 0, time.Now()) {
		return nil
	}
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return cause(err)
	}
	n := copy(b[otherNameAt:], d.name)
	_, err = w.WriteAt(b[otherNameAt:otherNameAt+n], otherNameAt)
	if err == nil {
		host.PutUint64(b, uint64(n))
		_, err = w.WriteAt(b[:8], otherAt)
	}
	return errors.Join(err, w.Close())
}

// tellState takes another device's map, which was written down, away. looked says that now
// knows a block device's content; where it has to and does not, the error is errLook.
func (d *Device) tellState(name string, now identity, looked bool) error {
	disk, dir := d.cat.disk, d.cat.stateDir(name)
	c, err := openCheckpoint(disk, filepath.Join(dir, "map"))
	if err != nil {
		return nil // nobody trusts it
	}
	if err := c.file.Close(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	sameBoot := c.boot == d.cat.boot
	if !looked && !sameBoot && !now.isFile() && !c.origin.isFile() && c.origin.size == now.size {
		return errLook
	}
	if !c.origin.sameDisk(now, sameBoot) {
		return nil
	}
	if now.isFile() {
		r, err := openRegions(disk, filepath.Join(dir, "regions"))
		if err != nil {
			return nil
		}
		lease := r.state.lease
		if r.file.Close(); stampTells(lease, c.clean, time.Now()) {
			return nil
		}
	}
	d.cfg.Log.Warn("the origin was another device: its change tracking ends", "was", name)
	return errors.Join(removeFile(disk, filepath.Join(dir, "map")), disk.syncDir(dir))
}
