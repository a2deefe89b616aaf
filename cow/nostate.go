// Going on without the state directory: its disk does not answer, or fails, before anybody
// has its lock.
//
// Without the lock nothing in it may be read or changed: another daemon may be at work there.
// So for the devices every call on the state disk ends at once, as one that got no answer
// (patience.go), and that stays so until the next start: a device goes on with the generation
// that the run directory has in this boot, or begins one that does not outlive the machine.
//
// What the state directory holds does not know of the writes that follow, and the next start
// must not believe it. After a reboot that is told by an attribute of the origin (endFound).
// In the same boot, also where an origin has no place for that, by the lease file: from when a
// device has no durable state until what there was is gone for good, it says that the state
// directory is behind. Of block devices that have no lease file then, or another name, the
// catalogue says it (distrust.go).

package cow

import (
	"errors"
)

// WithoutState has nothing outlive the machine, because of why, and nothing in the state
// directory be touched. It is called before the first device is opened.
func (c *Catalogue) WithoutState(why error) {
	c.disk = noDisk{unanswered{why}}
	c.doubt(allBlock) // which does not fail before Recover
}

// allBlock is in place of a device's name where the catalogue says, until the machine is
// started anew, that no map of a block device may be believed which only the state directory
// has: the disk may have been written under another name, or the lease file be lost.
const allBlock = ""

// errUnknown is of such a map.
var errUnknown = errors.New("the state directory could not be had for a while since the machine was started: nobody knows who wrote to the origin")

// stateless is why the state directory is not to be touched, nil where it is.
func (c *Catalogue) stateless() error {
	if d, ok := c.disk.(noDisk); ok {
		return d.why
	}
	return nil
}

// unanswered is an error that counts as errNoAnswer.
type unanswered struct{ error }

func (unanswered) Is(target error) bool { return target == errNoAnswer }
func (u unanswered) Unwrap() error      { return u.error }

// noDisk is a stateDisk that nobody looks at.
type noDisk struct{ why error }

func (d noDisk) open(string, bool) (durableFile, error) { return nil, d.why }
func (d noDisk) rename(string, string) error            { return d.why }
func (d noDisk) remove(string) error                    { return d.why }
func (d noDisk) removeAll(string) error                 { return d.why }
func (d noDisk) mkdir(string) error                     { return d.why }
func (d noDisk) syncDir(string) error                   { return d.why }

// errBehind is of a state directory that does not know what was written since.
var errBehind = errors.New("writes could not be recorded for a while")

// noteBehind notes where a killed process leaves it whether the state directory may hold
// something that does not know of all writes.
func (d *Device) noteBehind(behind bool) {
	var word uint64
	if behind {
		word = 1
	}
	d.always(func() { wordAt(d.leaseMemory.Bytes(), behindAt).Store(word) })
}

// leftBehind returns errBehind if the lease file says so.
func leftBehind(mem *memory) error {
	if wordAt(mem.Bytes(), behindAt).Load() != 0 {
		return errBehind
	}
	return nil
}
