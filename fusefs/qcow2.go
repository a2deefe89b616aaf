// The files DEVICE.qcow2, the whole image, and DEVICE@NUM.qcow2, what changed in it
// after snapshot NUM. Package qcow2 makes them.
//
// Where data is and what changed is asked at a stat and at the first open, as for
// since/NUM. The answer is the same while the snapshot lives: an image keeps what
// is a hole in it, and its map is frozen. Only writes to a writable image, this
// one or an older one, mark more in that map. Then whoever opens the file next has
// a new one: an increment that lacks what is marked would be wrong over a backup
// of the image that was written.

package fusefs

import (
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"blksnap/fusefs/qcow2"
)

const qcow2Suffix = ".qcow2"

// fullItem returns an item for the qcow2 file of a whole image.
func fullItem(tr traits, device string, image Image) item {
	return item{device + qcow2Suffix, syscall.S_IFREG, func() entry {
		return qcow2File(tr, image, "", func() (iter.Seq2[Run, error], error) { return image.Changes().All(), nil })
	}}
}

// increment returns a new node for the file called name, if it is what changed in
// an image of snap since a number that is known; otherwise nil.
func increment(tr traits, snap Snapshot, name string) entry {
	stem, ok := strings.CutSuffix(name, qcow2Suffix)
	at := strings.LastIndexByte(stem, '@') // no device has one in its name
	if !ok || at < 0 {
		return nil
	}
	image, ok := snap.Image(stem[:at])
	if !ok {
		return nil
	}
	changes := image.Changes()
	runs, ok := numOf(stem[at+1:], changes, image.Changes)
	if !ok {
		return nil
	}
	if _, err := runs(); err != nil {
		return nil // what changed is lost
	}
	return qcow2File(tr, image, stem+"-"+changes.Generation(), runs)
}

// increments lists the files since the numbers of existing snapshots.
func increments(device string, image Image) []fuse.DirEntry {
	var names []fuse.DirEntry
	for _, num := range image.Changes().Numbers() {
		name := device + "@" + strconv.FormatUint(num, 10) + qcow2Suffix
		names = append(names, fuse.DirEntry{Name: name, Mode: syscall.S_IFREG})
	}
	return names
}

func qcow2File(tr traits, image Image, backing string, runs func() (iter.Seq2[Run, error], error)) *madeFile {
	disk := qcow2.Disk{Size: image.Size(), Block: image.Changes().BlockSize(), Backing: backing}
	return &madeFile{
		node:  node{traits: tr.as(syscall.S_IFREG, 0)},
		maker: qcow2Maker{tr.tree, image, disk, runs},
		perm:  imagePerm,
	}
}

// qcow2Maker makes qcow2 files.
type qcow2Maker struct {
	tree  *Tree
	image Image
	disk  qcow2.Disk
	runs  func() (iter.Seq2[Run, error], error)
}

func (m qcow2Maker) measure() (edition, error) {
	runs, err := m.runs()
	if err != nil {
		return edition{}, err
	}
	e, err := m.disk.Measure(runs)
	return edition{e.Size, e.Sum}, err
}

func (m qcow2Maker) fill() (content, edition, error) {
	use, err := m.tree.open.acquire(m.image)
	if err != nil {
		return nil, edition{}, err
	}
	c := &qcow2Content{use: use, budget: &m.tree.contents}
	e, err := c.make(m)
	if err != nil {
		c.free()
		return nil, edition{}, err
	}
	return c, edition{e.Size, e.Sum}, nil
}

// qcow2Content is an open qcow2 file. Its image is in use.
type qcow2Content struct {
	file   *qcow2.File
	use    *use
	budget *budget
	held   int64 // taken from the budget
}

func (c *qcow2Content) make(m qcow2Maker) (e qcow2.Edition, err error) {
	runs, err := m.runs()
	if err != nil {
		return qcow2.Edition{}, err
	}
	c.file, e, err = m.disk.Make(m.image, runs, c.take)
	return e, err
}

func (c *qcow2Content) take(n int64) error {
	err := c.budget.take(n)
	if err == nil {
		c.held += n
	}
	return err
}

func (c *qcow2Content) readAt(p []byte, off int64) (int, error) {
	n, err := c.file.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return n, err
	}
	// Tables are read without the image. Where it is lost nobody is to think that
	// he has a copy of it.
	if state := c.use.image.State(); state != "ok" {
		return n, fmt.Errorf("the image is %s", state)
	}
	return n, nil
}

func (c *qcow2Content) free() {
	c.budget.used.Add(-c.held)
	c.use.release()
}
