// What a rollback leaves that did not end: a device that is torn, between what it was
// and what the snapshot is.
//
// As long as the snapshot is there the rollback can go on. But it may be lost
// meanwhile, the origin may refuse a write, and a loss of power takes all snapshots.
// So it is noted in the state directory, durably, before the first byte is written
// back, and taken back when the last one is on the disk. A device with a note and
// without a pending rollback is served, and failed: whoever looks must be told that
// its content makes no sense.
//
// Another rollback mends it, to a snapshot that was there before the tear. (A later
// one is of the torn device.) Else the device is restored by other means, and then
// removed and added, which forgets the note.
//
// The file, numbers little-endian:
//
//	offset  size  field
//	     0     8  "blksnapT"
//	     8     4  version, 1
//	    12     4  CRC-32C of bytes 0 to 11 and 16 to 95
//	    16     8  number of the device's last snapshot when the rollback began
//	    24     8  length of the snapshot's name
//	    32    64  name of the snapshot

package cow

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"sync"
)

const (
	tearMagic   = "blksnapT"
	tearVersion = 1
	tearBytes   = 32 + maxName
)

// tear is a rollback that has begun to write. It never changes.
type tear struct {
	number   uint64 // of the device's last snapshot before it
	snapshot string
	unread   error // why nobody knows whether there is one
}

func (t *tear) String() string {
	if t.unread != nil {
		return fmt.Sprintf("cannot tell whether a rollback has ended: %v", t.unread)
	}
	return fmt.Sprintf("a rollback to %s did not end: the content is neither what it was nor that of the snapshot", t.snapshot)
}

func (t *tear) encode() []byte {
	b := make([]byte, tearBytes)
	le := binary.LittleEndian
	copy(b, tearMagic)
	le.PutUint32(b[8:], tearVersion)
	le.PutUint64(b[16:], t.number)
	le.PutUint64(b[24:], uint64(copy(b[32:], t.snapshot)))
	le.PutUint32(b[12:], sumWithout(b))
	return b
}

func decodeTear(b []byte) (*tear, error) {
	le := binary.LittleEndian
	switch {
	case len(b) != tearBytes || string(b[:8]) != tearMagic:
		return nil, fmt.Errorf("%w: note of a rollback: no magic", ErrDamaged)
	case le.Uint32(b[8:]) != tearVersion:
		return nil, fmt.Errorf("%w: note of a rollback: version %d, this is %d", ErrVersion, le.Uint32(b[8:]), tearVersion)
	case le.Uint32(b[12:]) != sumWithout(b) || le.Uint64(b[24:]) > maxName:
		return nil, fmt.Errorf("%w: note of a rollback: checksum", ErrDamaged)
	}
	return &tear{number: le.Uint64(b[16:]), snapshot: string(b[32:][:le.Uint64(b[24:])])}, nil
}

// tearPath is where the note is, empty where nothing outlives the machine.
func (d *Device) tearPath() string {
	if d.stateDir == "" {
		return ""
	}
	return filepath.Join(d.stateDir, "rollback")
}

// beginTear notes, durably, that the device is about to be torn. What tore it before
// stays noted. A rollback that goes on after a kill has noted it before, and needs not see
// the note: it may have written already, and to leave the device like that would be worse.
func (i *Image) beginTear() error {
	d := i.device
	if t := d.tear.Load(); t != nil && t.unread != nil {
		err := within(d.cfg.PreserveLimit, func() error { d.findUnreadTear(); return nil })
		if t = d.tear.Load(); t != nil && t.unread != nil {
			if i.hasTorn() {
				return nil
			}
			return fmt.Errorf("note the rollback: %w", cmp.Or(err, errors.New(t.String())))
		}
	}
	if d.tear.Load() == nil {
		t := &tear{number: d.changes().Number(), snapshot: i.snapshot.name}
		if err := d.noteTear(t); err != nil {
			return fmt.Errorf("note the rollback: %w", err)
		}
		d.tear.Store(t)
	}
	d.mu.Lock()
	if d.rollback.Load() == i { // else it has ended
		d.guardedLocked(func() { i.layer.setRollback(rollbackTorn) })
	}
	d.mu.Unlock()
	d.cat.did("note a tear")
	return nil
}

// hasTorn says whether the rollback to the image has noted a tear, in this life or before.
func (i *Image) hasTorn() (yes bool) {
	i.device.guarded(func() { yes = i.layer.rollback() == rollbackTorn })
	return yes
}

// endTear takes the note back after the device became what the image is.
func (i *Image) endTear() {
	d := i.device
	t := d.tear.Load()
	if i.frozen.Number() > t.number {
		return
	}
	if err := within(d.cfg.PreserveLimit, d.forgetTear); err != nil {
		d.cfg.Log.Error("cannot note that a rollback has ended: the next start may say that it has not", "err", err)
	}
	d.tear.Store(nil)
	d.cat.did("take back the note of a tear")
}

// noteTear notes t durably. The device takes no writes meanwhile, so a state disk that
// hangs is waited for no longer than a snapstore; what is written after that is taken
// back.
func (d *Device) noteTear(t *tear) error {
	if d.stateDir == "" {
		return nil
	}
	var mu sync.Mutex
	var noted, late bool
	err := within(d.cfg.PreserveLimit, func() error {
		if err := d.writeTear(t); err != nil {
			return errors.Join(err, d.forgetTear()) // it may be there all the same
		}
		mu.Lock()
		noted = true
		undo := late
		mu.Unlock()
		if undo {
			return d.forgetTear()
		}
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	if errors.Is(err, errNoAnswer) {
		if noted {
			return nil // just in time
		}
		late = true
	}
	return err
}

func (d *Device) writeTear(t *tear) error {
	if err := makeDir(d.disk, d.cat.state, d.stateDir); err != nil {
		return err
	}
	return replaceFile(d.disk, d.tearPath(), func(f durableFile) error {
		_, err := f.WriteAt(t.encode(), 0)
		return err
	})
}

// forgetTear takes the note back, durably.
func (d *Device) forgetTear() error {
	if d.stateDir == "" {
		return nil
	}
	return errors.Join(d.removeFile(d.tearPath()), d.disk.syncDir(d.stateDir))
}

// readTear reads the note at path.
func readTear(disk stateDisk, path string) (*tear, error) {
	f, err := disk.open(path, false)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, tearBytes+1) // a longer one is none
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	return decodeTear(b[:n])
}

// findTear finds what a predecessor noted.
func (d *Device) findTear() {
	if path := d.tearPath(); path != "" {
		d.tear.Store(d.readTear(d.promptDisk(), path))
	}
}

// findUnreadTear is findTear once more, where the state disk did not answer.
func (d *Device) findUnreadTear() {
	was := d.tear.Load()
	if was == nil || !errors.Is(was.unread, errNoAnswer) {
		return
	}
	d.awaitPredecessor()
	now := d.readTear(d.disk, d.tearPath())
	if (now == nil || now.unread == nil) && d.tear.CompareAndSwap(was, now) {
		d.tellTear()
	}
}

// readTear is readTear for what a device is to say.
func (d *Device) readTear(disk stateDisk, path string) *tear {
	t, err := readTear(disk, path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, errNoAnswer):
		return &tear{unread: err}
	case err != nil:
		d.cfg.Log.Error("cannot tell which rollback did not end", "err", err)
		return &tear{snapshot: "an unknown snapshot"}
	}
	return t
}

// tellTear tells of a device that is torn and stays so.
func (d *Device) tellTear() {
	t := d.tear.Load()
	if t == nil || d.RollingBack() != nil {
		return
	}
	if t.unread != nil {
		d.cfg.Log.Error("cannot tell whether a rollback has ended", "err", t.unread)
		return
	}
	d.cfg.Log.Error("rollback did not end", "snapshot", t.snapshot, "err", t.String())
	d.event(EventRollbackFailed, t.snapshot, t.String())
}
